"""The format and geometry of a copy, the target for a new QED image, and the image's base."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from qedfuse.disk.creation.newheader import backing_name, new_header
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.foreignopening import driver_of
from qedfuse.errors import BackingError, CacheError, ForeignError, QedError, RemoteError
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.remote.address import require_storable, shown_name
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import probe_any
from qedfuse.tools.common.newbacking import foreign_base_driver
from qedfuse.tools.source.source import open_source, warn_if_named_raw
from qedfuse.tools.target.qedtarget import NewQedTarget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.options import BackingFormat, BackingPolicy, OpenOptions
    from qedfuse.tools.common.formatprobe import FormatChoice, ImageFormat
    from qedfuse.tools.source.source import Source

DEFAULT_SPARSE_SIZE: Final = 4096
"""Default of `ImageSpec.sparse_size`."""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """The format and geometry of a copy.

    For an existing target only ``format`` and ``sparse_size`` are used.  For a pipe ``format`` must
    be ``raw``, and ``sparse_size`` only affects `ConvertResult.data_bytes`.  An existing target and
    a pipe cannot have a ``backing``.

    Attributes:
        format: ``raw``, ``qed``, or another format that qemu-img makes.
        cluster_size: Bytes in a cluster of a QED image.
        table_size: Clusters in a table of a QED image.
        backing: Name of the backing file of a new QED image, see `backing_path`; None for none.
            Only clusters that differ from the backing file are written.
        backing_format: Format of the backing file; None accepts any but raw.
        sparse_size: Minimum length in bytes of a run of zeros that is not written as data; with 0,
            zeros are written like other data.  In a QED image only whole clusters make a run.
        foreign_options: Arguments for ``-o`` of qemu-img; ignored for ``raw`` and ``qed``.
    """

    format: str = "qed"
    cluster_size: int = DEFAULT_CLUSTER_SIZE
    table_size: int = DEFAULT_TABLE_SIZE
    backing: str | None = None
    backing_format: BackingFormat | None = None
    sparse_size: int = DEFAULT_SPARSE_SIZE
    foreign_options: tuple[str, ...] = ()


def qed_target(
    fd: int, name: str, spec: ImageSpec, source: Source | None, base: Source | None
) -> NewQedTarget:
    """Return the target for a new QED image.

    Args:
        fd: Descriptor of the empty file; negative to write nothing.
        name: Name of the file in messages.
        spec: Geometry of the image and name of its backing file.
        source: The disk that will be copied; None for a stream, whose size is not known yet.
        base: The open backing file; None if the image has no backing file.

    Raises:
        UsageError: The geometry is invalid or too small for the disk, or the name of the backing
            file cannot be stored.
    """
    require_storable(spec.backing or "")
    header = new_header(
        0 if source is None else source.size,
        spec.cluster_size,
        spec.table_size,
        spec.backing,
        # A disk that QEMU serves is a raw source, but its file is not raw.
        backing_is_raw=base is not None
        and base.format == "raw"
        and driver_of(base.layer_files()[0]) is None,
    )
    return NewQedTarget(fd, header, backing_name(spec.backing), name)


@asynccontextmanager
async def open_new_base(image: str, spec: ImageSpec, options: OpenOptions) -> AsyncIterator[Source]:
    """Open the backing file of a new image as a source for the caller's ``with`` block.

    Args:
        image: Path of the new image; the name of the backing file is relative to its directory.
        spec: The name and the format of the backing file; the name must not be None.
        options: How to open the backing file.

    Raises:
        BackingError: The backing file cannot be opened or locked, is not a regular file, or has
            another format than ``spec`` states.  Or it is raw, and ``spec`` states no format.
        ForeignError: QEMU reads the backing file, and is not installed or fails.
        RemoteError: The server of the backing file, or of one of its bases, does not serve it.
        CacheError: The directory of the cache cannot be used.
    """
    path = backing_path(image, spec.backing or "", options.backing.working_directory)
    about = f"{printable(image)}: backing file"
    try:
        expected = "a QED image"
        if spec.backing_format is None:
            expected += ", or -F raw for any other content"
        found: FormatChoice = "raw"
        driver = foreign_base_driver(path, spec.backing_format)
        if driver is not None:
            found = "auto"
        elif spec.backing_format != "raw":
            found = await probe_any(path, options.remote, expected)
        if found not in ("auto", spec.backing_format or "qed"):
            msg = f"{shown_name(path)}: found no QED magic, expected {expected}"
            raise BackingError(msg)
        if spec.backing_format is None:
            warn_if_named_raw(path, shown_name(path), driver or found)
        async with AsyncExitStack() as stack:
            base = await stack.enter_async_context(
                open_source(path, found, options, warn_if_foreign=False)
            )
            if base.is_device:
                msg = f"{printable(path)}: found a block device, expected a regular file"
                raise BackingError(msg)
            opened = stack.pop_all()
    except (RemoteError, CacheError, ForeignError) as error:
        raise error.prefixed(about + " ") from error
    except QedError as error:
        msg = f"{about} {error}"
        raise BackingError(msg) from error
    async with opened:
        yield base


@asynccontextmanager
async def open_copy(
    path: str, final_path: str, spec: ImageSpec, options: OpenOptions
) -> AsyncIterator[Source]:
    """Open a copy that was just written as a source for the caller's ``with`` block.

    Errors, also those of the block, name the copy by its final path.

    Args:
        path: The present path of the copy.
        final_path: The path that the copy will have.
        spec: The format and the backing file of the copy.
        options: How the source and the backing file were opened.

    Raises:
        QedError: The copy or a backing file cannot be opened or read.
    """
    # The lock of an existing target has been released, so another program may have locked it.
    options = replace(options, force_share=True)
    if spec.backing is not None:
        options = replace(options, backing=_policy_of_copy(final_path, spec.backing, options))
    copy_format: ImageFormat = "raw" if spec.format == "raw" else "qed"
    try:
        async with open_source(path, copy_format, options) as copy:
            yield copy
    except QedError as error:
        raise error.renamed(printable(path), printable(final_path)) from error


def _policy_of_copy(image: str, backing: str, options: OpenOptions) -> BackingPolicy:
    """Return the policy by which a new image opens the backing file that the user has named.

    The user's policy is for images that name their own bases.  So ``none`` and the format of these
    bases do not apply to the named file: the first bytes or the header show its format.  With
    ``none`` the file has no base, because `open_new_base` has opened it.
    """
    policy = options.backing
    is_foreign = policy.format not in (None, "raw", "qed")
    return replace(
        policy,
        mode="confined" if policy.mode == "none" else policy.mode,
        trusted=backing_path(image, backing, policy.working_directory),
        format=None,
        foreign="qemu" if is_foreign else policy.foreign,
    )
