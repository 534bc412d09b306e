"""Creating a new empty image, which gets its name when it is complete.

`create` is not asynchronous, because loading trio would slow down a script that creates many
images.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.disk.creation.create import make_image
from qedfuse.disk.creation.newheader import new_header
from qedfuse.errors import UsageError
from qedfuse.hostio.lockedfile import open_locked
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.remote.address import require_local, require_storable, shown_name
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import examine_base

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.options import BackingFormat
    from qedfuse.tools.common.newbacking import NewBase
    from qedfuse.util.backgroundtasks import Progress


_ALLOCATION_CHUNK_BYTES: Final = 1 << 28
"""Maximum number of bytes of the disk that are allocated between two reports of progress."""


@dataclass(frozen=True, slots=True)
class CreateResult:
    """The image that was created.

    Attributes:
        path: The image.
        size: Bytes of the disk.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: The name of the backing file, as stored; None if the image has none.
        backing_format: Format of the backing file; meaningless if the image has no backing file.
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
    backing_format: BackingFormat | None = None,
    unsafe: bool = False,
    overwrite: bool = False,
    fill: Callable[[str], object] | None = None,
    examined: NewBase | None = None,
) -> CreateResult:
    """Create an image.

    The image gets its name when it is complete (`NewFile`).

    Args:
        path: Path of the image.
        size: Bytes of the disk, rounded up to whole sectors.  None for the size of the backing
            file's disk; refused if there is no backing file, or if ``unsafe`` leaves its size
            unknown.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: Name of the backing file, see `backing_path`; None for no backing file.  Without
            ``unsafe``, a URL needs ``examined``, and so does an image that only QEMU reads, unless
            ``backing_format`` is ``raw``.
        backing_format: Format of the backing file.  None for QED, or for the format in
            ``examined``.  With ``unsafe`` a backing file needs a format here.
        unsafe: Do not open the backing file, which need not exist.
        overwrite: Replace an existing file, unless that file is in use as an image.
        fill: Called with the temporary path of the image, before the image gets its name.  If it
            raises an error, no image is created.
        examined: The result of `examine_url` if the backing file is a URL, and of
            `examine_foreign` if only QEMU reads the backing file; else None.

    Raises:
        UsageError: An argument is invalid or missing, or the file exists and ``overwrite`` is
            False.
        BackingError: The backing file cannot be read, has an invalid header or is not of the given
            format, or the image is among the files of its chain.
        ImageError: The existing file is not a regular file.
        ImageInUseError: The old file is in use as an image, or another file has taken the name of
            the image during the call.
        HostError: A system call failed, or the file system is full.
    """
    require_local(path)
    if backing == "":
        msg = f"{printable(path)}: backing file: found an empty name, expected a path or no name"
        raise UsageError(msg)
    require_storable(backing or "")
    found = examined
    found_format: str | None = backing_format
    if backing is not None and not unsafe and found is None:
        require_local(backing)
        found = examine_base(path, backing, backing_format)
    if found is not None:
        size, found_format = found.size if size is None else size, found.format
    elif backing is not None and found_format is None:
        msg = (
            f"{printable(path)}: backing file {shown_name(backing)}: found no format, expected "
            "-F raw or -F qed"
        )
        raise UsageError(msg)
    if size is None:
        other = "" if unsafe else ", or a backing file to read the size from"
        msg = f"{printable(path)}: size: found none, expected a size{other}"
        raise UsageError(msg)
    header = new_header(
        size, cluster_size, table_size, backing, backing_is_raw=found_format == "raw"
    )
    versions = None if found is None else found.versions
    make_image(path, header, backing, overwrite=overwrite, fill=fill, versions=versions)
    return CreateResult(path, header.image_size, cluster_size, table_size, backing, found_format)


async def preallocate(temporary: str, path: str, progress: Progress | None = None) -> None:
    """Allocate every cluster of a new image without a backing file, and reserve space for them.

    Args:
        temporary: The path of the image until the image is complete.
        path: The name of the image in messages.
        progress: Called with the bytes allocated so far, and the size of the disk.

    Raises:
        NoSpaceError: The host is full.
        QedError: The image cannot be opened for writing, or a system call failed.
    """
    # Imported late, because only preallocation opens a disk.
    from qedfuse.disk.opening import open_disk_in  # noqa: PLC0415  late, see above
    from qedfuse.disk.options import OpenOptions  # noqa: PLC0415  late, see above
    from qedfuse.hostio.posixfile import PosixFile  # noqa: PLC0415  late, see above

    options = OpenOptions(writable=True)
    fd = open_locked(temporary, options.image_lock, writable=True, name=path)
    with closing(PosixFile(fd, path, writable=True)) as file:
        async with open_disk_in(file, temporary, options) as disk:
            await _allocate_all(disk, progress)


async def _allocate_all(disk: Disk, progress: Progress | None) -> None:
    """Allocate every cluster of a disk, and reserve space for them; see `preallocate`."""
    for at in range(0, disk.size, _ALLOCATION_CHUNK_BYTES):
        if progress is not None:
            progress(at, disk.size)
        await disk.allocate(at, _ALLOCATION_CHUNK_BYTES)
