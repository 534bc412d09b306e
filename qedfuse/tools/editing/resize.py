"""Giving the disk of an image another size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class ResizeResult:
    """What a change of size came to; all in bytes but for the clusters.

    Attributes:
        size_before: The disk's size before.
        size: The disk's size now.
        bytes_before: Length of the file before.
        bytes_after: Length of the file now.
        free_clusters: Clusters in the midst of the file that are free, as far as known,
            because moving others there takes longer than the options allow; they take up
            no space on the host.
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
    progress: Callable[[int, int], None] | None = None,
) -> ResizeResult:
    """Give the disk of an image ``size`` bytes, a multiple of 512.

    What is added reads as zeros, also where the image is an overlay over a longer base.

    Args:
        path: The image.
        size: Bytes; with ``relative`` how many more, or less.
        relative: Count from the present size.
        shrink: Let the disk become smaller.
        force: Lose what the image holds past the end, the new one or the old.
        options: How to open it; it is opened for writing in any case.
        progress: Called with how much is done of how much, in any unit.

    Raises:
        UsageError: The disk would shrink without leave, or lose data, or the size is not
            one that the image can have.
        QedError: The image cannot be opened for writing, or the host refused.
    """
    wanted = replace(options or OpenOptions(), writable=True)
    async with open_disk(path, wanted, inspector=inspect_image) as disk:
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
