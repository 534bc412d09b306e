"""Making the file of an image as short as it can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class CompactResult:
    """What compacting an image came to.

    Attributes:
        bytes_before: Length of the file before.
        bytes_after: Length of the file now.
        moved_clusters: How many clusters were moved.
    """

    bytes_before: int
    bytes_after: int
    moved_clusters: int


async def compact(
    path: str,
    options: OpenOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CompactResult:
    """Move the highest clusters of an image into its holes and cut off the end.

    The image is sound at any moment; what was moved before an interruption stays moved.

    Args:
        path: The image.
        options: How to open it; it is opened for writing in any case.
        progress: Called with the bytes moved so far and in all.

    Raises:
        QedError: The image cannot be opened for writing, or the host refused.
    """
    wanted = replace(options or OpenOptions(), writable=True)
    async with open_disk(path, wanted, inspector=inspect_image) as disk:
        before = disk.fstat().st_size
        moved = await disk.compact(progress)
        after = disk.statistics().file_bytes
    return CompactResult(before, after, moved)
