"""Compacting an image: its file becomes as short as possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.disk.options import OpenOptions
from qedfuse.tools.common.writabledisk import damaged_error, open_writable

if TYPE_CHECKING:
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class CompactResult:
    """The result of compacting an image; lengths in bytes.

    Attributes:
        bytes_before: Length of the file before the compaction.
        bytes_after: Length of the file after the compaction.
        moved_clusters: Number of clusters that were moved.
        free_clusters: Number of free clusters that are left in the file; 0 also if unknown.
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
    """Move the highest clusters of an image into its free clusters, and truncate the file.

    The image is valid at any moment.  After an interruption or an error, clusters that were moved
    stay moved.  Backing files are not opened.  If the image has too many tables, nothing is moved,
    and a warning is logged.

    Args:
        path: The image.
        options: How to open the image; ``compact`` and ``writable`` are ignored.  None for the
            defaults.
        progress: Called with the bytes moved so far, and the bytes that will probably be moved in
            all.

    Raises:
        CorruptImageError: The tables are damaged.
        NeedsCheckError: The image is too large for the scan for free clusters.
        QedError: The image cannot be opened for writing, or a system call failed.  The image is
            sound.
    """
    # Without compact="off", the close of the disk could compact the image a second time, in vain.
    disk_options = replace(options or OpenOptions(), compact="off")
    async with open_writable(path, disk_options, with_bases=False) as disk:
        before = disk.fstat().st_size
        # A bound on the file's length (`Geometry.bound`) protects the host against guests, but no
        # guest can start this compaction.  Without the bound more tables can move, because data in
        # their way can first move to the end of the file.
        moved = await disk.compact(progress, within_bound=False)
        if disk.damaged:
            raise damaged_error(disk, "not fully compacted")
        statistics = disk.statistics()
    # An error that only left the free list out has been logged.
    if disk.space_error is not None:
        raise disk.space_error
    return CompactResult(before, statistics.file_bytes, moved, statistics.free_clusters or 0)
