"""Creating a new empty image: its backing file is checked, its name appears when it is complete.

Only `preallocate` is asynchronous.  Nothing else here blocks for long, and a script that
creates many images should not wait for an event loop to be loaded each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.disk.creation.create import make_image
from qedfuse.disk.creation.newheader import new_header
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import size_and_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.tools.common.formatprobe import ImageFormat
    from qedfuse.util.backgroundtasks import Progress


_ALLOCATION_CHUNK_BYTES: Final = 1 << 28
"""Bytes of the disk that are allocated between two reports of progress."""


@dataclass(frozen=True, slots=True)
class CreateResult:
    """The image that was created.

    Attributes:
        path: The image.
        size: Bytes of the disk.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: The name of the backing file, as stored.
        backing_format: Format of the backing file.
    """

    path: str
    size: int
    cluster_size: int
    table_size: int
    backing: str | None = None
    backing_format: str | None = None


def create(
    path: str,
    size: int | None = None,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing: str | None = None,
    backing_format: ImageFormat | None = None,
    unsafe: bool = False,
    overwrite: bool = False,
    fill: Callable[[str], object] | None = None,
) -> CreateResult:
    """Create an image; until it is complete ``path`` is absent, or still the old file.

    Args:
        path: Name of the image.
        size: Bytes of the disk; by default those of the backing file.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: The backing file, by a name that is absolute or begins at the image's
            directory.
        backing_format: Format of the backing file; may be omitted if it is QED.
        unsafe: Do not open the backing file, which need not exist.
        overwrite: Replace an existing file, unless it is in use as an image.
        fill: Called with the temporary name of the image, before it gets its own name.

    Raises:
        UsageError: A size or the geometry is invalid, or the file exists.
        BackingError: The backing file is missing or not of the given format.
        ImageInUseError: The old file is open elsewhere, or another file has taken its name
            meanwhile.
        HostError: The host refused, or is full; no file is left behind.
    """
    if backing == "":
        msg = f"{printable(path)}: backing file: found an empty name, expected a path or no name"
        raise UsageError(msg)
    if backing is not None and not unsafe:
        found, backing_format = size_and_format(path, backing, backing_format)
        size = found if size is None else size
    elif backing is not None and backing_format is None:
        msg = f"{printable(path)}: backing file {printable(backing)}: its format must be given"
        raise UsageError(msg)
    if size is None:
        msg = f"{printable(path)}: size: found none, expected one, or a base that has one"
        raise UsageError(msg)
    header = new_header(
        size, cluster_size, table_size, backing, backing_is_raw=backing_format == "raw"
    )
    make_image(path, header, backing, overwrite=overwrite, fill=fill)
    return CreateResult(path, header.image_size, cluster_size, table_size, backing, backing_format)


async def preallocate(path: str, progress: Progress | None = None) -> None:
    """Allocate every cluster of a disk without a backing file, and its space on the host.

    ``progress`` is called with the bytes allocated so far and in all.

    Raises:
        NoSpaceError: The host is full.
    """
    # Imported here: without preallocation no disk is opened.
    from qedfuse.disk.opening import open_disk  # noqa: PLC0415
    from qedfuse.disk.options import OpenOptions  # noqa: PLC0415

    async with open_disk(path, OpenOptions(writable=True)) as disk:
        for at in range(0, disk.size, _ALLOCATION_CHUNK_BYTES):
            if progress is not None:
                progress(at, disk.size)
            await disk.allocate(at, _ALLOCATION_CHUNK_BYTES)
