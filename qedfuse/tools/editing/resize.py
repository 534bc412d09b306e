"""Changing the size of an image's disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError
from qedfuse.tools.common.writabledisk import open_writable

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class ResizeResult:
    """The result of a change of size; sizes and lengths in bytes.

    Attributes:
        size_before: Size of the disk before the change.
        size_after: Size of the disk after the change.
        bytes_before: Length of the file before the change.
        bytes_after: Length of the file after the change.
        free_clusters: Number of free clusters that the change has left in the file; 0 if unknown.
    """

    size_before: int
    size_after: int
    bytes_before: int
    bytes_after: int
    free_clusters: int


async def resize(
    path: str,
    size: int,
    *,
    relative: bool = False,
    shrink: bool = False,
    force: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> ResizeResult:
    """Change the size of an image's disk to a multiple of 512 bytes.

    An added range reads as zeros, even if the image is an overlay over a longer base.

    Args:
        path: The image.
        size: The new size in bytes; with ``relative`` the number of bytes to add.
        relative: Whether ``size`` is added to the present size; it may then be negative.
        shrink: Allow the disk to become smaller.
        force: Allow the loss of data.  A disk that shrinks loses the data past its new end.  A
            disk that grows loses data that another program has left past its old end.
        options: How to open the image; ``writable`` is always set.  None for the defaults.
        progress: Called with the work done and the whole work of shrinking, in the same unspecified
            unit.

    Raises:
        UsageError: The size is negative, not a multiple of 512, or more than the tables can
            address.  Without ``shrink``: the disk would become smaller.  Without ``force``: the
            disk would lose data past its new end.
        CorruptImageError: A check found damage, or a table entry for the added or removed range is
            bad.  Without ``force``: a table entry for the added range refers to data.
        QedError: The image cannot be opened for writing, or a system call failed.
    """
    async with open_writable(path, options) as disk:
        size_before, bytes_before = disk.size, disk.fstat().st_size
        target = size_before + size if relative else size
        if target < 0:
            msg = f"{disk.name}: size: found {target}, expected at least 0"
            raise UsageError(msg)
        if target < size_before:
            if not shrink:
                msg = (
                    f"{disk.name}: size: found {target}, expected at least {size_before} (--shrink "
                    "lets the disk become smaller)"
                )
                raise UsageError(msg)
            await disk.shrink(target, force=force, progress=progress)
        elif target > size_before:
            await disk.grow(target, force=force)
        await disk.flush()
        await disk.autocompact()
        statistics = disk.statistics()
    return ResizeResult(
        size_before, target, bytes_before, statistics.file_bytes, statistics.free_clusters or 0
    )
