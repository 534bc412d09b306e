"""Making the file of an image as short as it can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What compacting an image came to.

    Attributes:
        bytes_before: Length of the file before.
        bytes_after: Length of the file now.
        moved_clusters: How many clusters were moved.
        free_clusters: How many are still free, because there was no room to move a table.
    """

    bytes_before: int
    bytes_after: int
    moved_clusters: int
    free_clusters: int = 0


async def compact(
    path: str,
    options: OpenOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CompactResult:
    """Move the highest clusters of an image into its holes and cut off the end.

    The image is sound at any moment; what was moved before an interruption stays moved.
    Bases are not looked at, and need not be there.

    Args:
        path: The image.
        options: How to open it; it is opened for writing in any case.
        progress: Called with the bytes moved so far and in all.

    Raises:
        CorruptImageError: The tables are damaged.
        QedError: The image cannot be opened for writing, or the host refused.
    """
    # What is left then is left because there is no room to move it.
    wanted = replace(options or OpenOptions(), writable=True, compact="off")
    async with open_disk(path, wanted, inspector=inspect_image, with_bases=False) as disk:
        before = disk.fstat().st_size
        moved = await disk.compact(progress, within_bound=False)
        if disk.damaged:
            msg = (
                f"{disk.name}: not compacted: found damaged tables; repair them first: qedimg "
                f"check -r all {disk.name}"
            )
            raise CorruptImageError(msg)
        found = disk.statistics()
    return CompactResult(before, found.file_bytes, moved, found.free_clusters or 0)
