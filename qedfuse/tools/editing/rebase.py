"""Rebasing an overlay: giving it another backing file without changing its content.

The content of the old base is copied into the overlay, wherever the overlay stores nothing and the
new base differs.  Then the overlay reads the same over either base.  When the copy is durable, the
name of the base in the overlay changes in one step.  An unsafe rebase changes only the name and the
format, so the content may change.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.disk.creation.newheader import backing_name
from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.disk.lookup.baseversion import versions_of
from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.foreignopening import driver_of
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import OpenOptions
from qedfuse.disk.state.backingname import new_name_offset
from qedfuse.errors import BackingError, UsageError
from qedfuse.hostio.imagefile import open_image_file
from qedfuse.ondisk.constants import Feature
from qedfuse.remote.address import require_local, require_storable, shown_name
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import foreign_base_driver, refuse_backing_loop
from qedfuse.tools.common.writabledisk import open_writable
from qedfuse.tools.editing.rebasecopy import RebaseCopy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.options import BackingFormat
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class RebaseResult:
    """The result of a rebase.

    Attributes:
        backing: The name of the new backing file, as stored; None if the image has none.
        backing_format: Format of the new backing file; None if the image has none.
        copied_bytes: Bytes of the disk that were copied into the image as data.
        zero_bytes: Bytes of the disk that became zero clusters of the image.
    """

    backing: str | None
    backing_format: str | None
    copied_bytes: int = 0
    zero_bytes: int = 0


async def rebase(
    path: str,
    backing: str | None,
    *,
    backing_format: BackingFormat | None = None,
    unsafe: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> RebaseResult:
    """Give an image another backing file, or remove its backing file.

    Args:
        path: The image.
        backing: Name of the new backing file, see `backing_path`; None or empty to remove the
            backing file.
        backing_format: Format of the new backing file, required with ``unsafe``.  None accepts QED
            and the formats that only QEMU reads.
        unsafe: Change only the name and the format; no data is compared or copied.  The backing
            files need not exist.  A loop is refused, and so is a local file that does not have the
            stated format, if only QEMU reads that format.
        options: How to open the image, always for writing; None for the defaults.  The new backing
            file may lie in any directory, because the user names it.
        progress: Called with the guest offset that the copy has reached, and the size of the disk;
            not called with ``unsafe``.

    Raises:
        UsageError: The image is a URL, the name cannot be stored, or the format is missing.  The
            image has not been changed.
        BackingError: A backing file is missing, refused by the policy for bases, or not of the
            given format.  Or the image is among the files of the new chain.
        CorruptImageError: A table entry of the image or of a base is bad, or a check found
            damage.
        QedError: The image cannot be opened for writing, or a system call failed.

    After an error the image names the old or the new backing file.  Without ``unsafe`` the disk of
    the image reads the same in both cases.
    """
    require_local(path)
    require_storable(backing or "")
    backing = backing or None
    name = backing_name(backing)
    options = options or OpenOptions()
    if unsafe:
        if backing is not None and backing_format is None:
            raise UsageError(_no_format(path, backing))
        if backing is not None:
            refuse_backing_loop(path, backing, options.backing.working_directory)
            _refuse_other_format(path, backing, backing_format, options)
        async with open_writable(path, options, with_bases=False) as disk:
            await disk.set_backing(name, backing_is_raw=backing_format == "raw")
        return RebaseResult(backing, backing_format if backing else None)
    async with (
        open_writable(path, options) as disk,
        _new_chain(disk, backing, backing_format, options) as chain,
    ):
        # If the name cannot be stored, this is the last moment to refuse it: the copy changes the
        # image.
        new_name_offset(disk.header, len(name), disk.name)
        # The versions of the bases are read before the copy: versions that are read later would
        # hide a change during the copy.
        bases = [layer.file for layer in chain.layers[1:]]
        versions = versions_of(bases) if bases else None
        copy = RebaseCopy(disk, chain)
        await copy.run(progress)
        driver = driver_of(chain.layers[1].file) if chain.has_base else None
        raw = chain.has_base and driver is None and isinstance(chain.layers[1], RawLayer)
        await disk.set_backing(name, backing_is_raw=raw, versions=versions)
        if progress is not None:
            progress(disk.size, disk.size)
    found = driver or ("raw" if raw else "qed")
    return RebaseResult(backing, found if backing else None, copy.copied_bytes, copy.zero_bytes)


@asynccontextmanager
async def _new_chain(
    disk: Disk,
    backing: str | None,
    backing_format: BackingFormat | None,
    options: OpenOptions,
) -> AsyncIterator[Chain]:
    """Yield the chain of the image over its new base; the first layer is the open image itself."""
    top = disk.chain.layers[0]
    if backing is None:
        yield Chain([top])
        return
    _refuse_other_format(disk.path, backing, backing_format, options)
    features = int(Feature.BACKING_FILE)
    if backing_format == "raw":
        features |= int(Feature.BACKING_FORMAT_NO_PROBE)
    header = replace(disk.header, features=features, backing_filename_size=len(backing))
    base = backing_path(disk.path, backing, options.backing.working_directory)
    # A format in a policy applies to every base of a chain.  The format in the caller's policy is
    # that of the present bases, so it is replaced.  For raw, the header above states the format.
    # For QED, and without a format, the first bytes decide.  A format that only QEMU reads is
    # stated in the new policy.  There it applies to one base only, because a base of such a format
    # is the last of its chain.
    stated = None if backing_format in (None, "raw", "qed") else backing_format
    policy = replace(options.backing, trusted=base, format=stated)
    with open_image_file(disk.path, None) as image:
        # `open_bases` recognises a loop by comparing each base with `image`.  Without this, it
        # would lock the image a second time, as a base, and the message would be "in use".
        bases = await open_bases(
            disk.path,
            image,
            header,
            replace(options, backing=policy, writable=False),
            make_store(options.cache_bytes),
            name=backing,
        )
    with closing_layers(bases):
        driver = driver_of(bases[0].file)
        if driver is not None and backing_format not in (None, driver):
            msg = (
                f"{disk.name}: backing file {bases[0].file.name}: found a {driver} image, "
                f"expected the format {backing_format}"
            )
            raise BackingError(msg)
        if driver is None and isinstance(bases[0], RawLayer) and backing_format != "raw":
            if backing_format is None:
                raise UsageError(_no_format(disk.path, backing))
            msg = (
                f"{disk.name}: backing file {bases[0].file.name}: found no QED magic, expected "
                "a QED image"
            )
            raise BackingError(msg)
        yield Chain([top, *bases])


def _refuse_other_format(
    path: str, backing: str, backing_format: BackingFormat | None, options: OpenOptions
) -> None:
    """Refuse a new base whose first bytes show that it is not of the stated foreign format.

    The image cannot record such a format, so a base that cannot be recognised by its first bytes (a
    fixed VHD) would later be read as raw.  A base that cannot be read is not refused here.
    """
    base = backing_path(path, backing, options.backing.working_directory)
    foreign_base_driver(base, backing_format, f"{printable(path)}: backing file ")


def _no_format(path: str, backing: str) -> str:
    """Return the message that the format of a base must be given."""
    return (
        f"{printable(path)}: backing file {shown_name(backing)}: found no format, expected -F raw "
        "or -F qed"
    )
