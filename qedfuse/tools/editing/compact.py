"""Compacting an image: its file becomes as short as possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError
from qedfuse.tools.common.writabledisk import open_writable

if TYPE_CHECKING:
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class CompactResult:
    """The result of compacting an image.

    Attributes:
        bytes_before: Length of the file before.
        bytes_after: Length of the file afterwards.
        moved_clusters: Number of clusters that were moved.
        free_clusters: Number of clusters still free, because no free run was long enough
            for a table.
    """

    bytes_before: int
    bytes_after: int
    moved_clusters: int
    free_clusters: int = 0


async def compact(
    path: str,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> CompactResult:
    """Move the highest clusters of an image into its holes, and truncate the file.

    The image is valid at any moment; clusters moved before an interruption stay moved.
    Backing files are not opened, and need not exist.

    Args:
        path: The image.
        options: How to open it; ``compact`` and ``writable`` are ignored.
        progress: Called with the bytes moved so far and in all.

    Raises:
        CorruptImageError: The tables are damaged.
        QedError: The image cannot be opened for writing, or the host refused.
    """
    # Without this, closing would compact again.  It would move nothing: clusters that are free
    # after this could not be filled.
    wanted = replace(options or OpenOptions(), compact="off")
    async with open_writable(path, wanted, with_bases=False) as disk:
        before = disk.fstat().st_size
        moved = await disk.compact(progress, within_bound=False)
        if disk.damaged:
            msg = (
                f"{disk.name}: not compacted: found damaged tables; repair them first: qedimg "
                f"check -r all {disk.name}"
            )
            raise CorruptImageError(msg)
        statistics = disk.statistics()
    return CompactResult(before, statistics.file_bytes, moved, statistics.free_clusters or 0)
