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
    """The result of a change of size; in bytes, except the clusters.

    Attributes:
        size_before: Size of the disk before.
        size: Size of the disk afterwards.
        bytes_before: Length of the file before.
        bytes_after: Length of the file afterwards.
        free_clusters: Clusters within the file that are known to be free, because moving
            others there takes longer than the options allow.  They are holes.
    """

    size_before: int
    size: int
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

    What is added reads as zeros, also if the image is an overlay over a longer base.

    Args:
        path: The image.
        size: Bytes; with ``relative`` the difference, which may be negative.
        relative: Count from the present size.
        shrink: Allow the disk to become smaller.
        force: Allow the loss of data past the new end of a smaller disk, and of data that
            another program left past the old end of a growing one.
        options: How to open it; ``writable`` is set in any case.
        progress: Called with the work done and the whole work, in any unit.

    Raises:
        UsageError: The disk would shrink or lose data without being allowed to, or the
            image cannot have the size.
        QedError: The image cannot be opened for writing, or the host refused.
    """
    async with open_writable(path, options) as disk:
        before, bytes_before = disk.size, disk.fstat().st_size
        target = before + size if relative else size
        if target < 0:
            msg = f"{disk.name}: size: found {target}, expected at least 0"
            raise UsageError(msg)
        if target < before:
            if not shrink:
                msg = (
                    f"{disk.name}: size: found {target}, expected at least {before} (--shrink "
                    "lets the disk become smaller)"
                )
                raise UsageError(msg)
            await disk.shrink(target, force=force, progress=progress)
        elif target > before:
            await disk.resize(target, force=force)
        await disk.flush()
        await disk.autocompact()
        statistics = disk.statistics()
    return ResizeResult(
        before, target, bytes_before, statistics.file_bytes, statistics.free_clusters or 0
    )
