"""Enabling and dropping the persistent free list of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.disk.options import OpenOptions
from qedfuse.tools.common.writabledisk import damaged_error, open_writable
from qedfuse.tools.inspection.freelistinfo import describe_free_list

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.tools.inspection.freelistinfo import FreeListInfo


async def enable(path: str, options: OpenOptions | None = None) -> FreeListInfo:
    """Find the free clusters of an image, punch them out of its file, and store a list of them.

    An image that has a valid list keeps this list, and nothing is punched.  No list is written if
    the image has no free cluster, or if the list would be too long.

    Args:
        path: The image.
        options: How to open the image; ``writable`` and ``free_list`` are ignored.

    Returns:
        The description of the list that the image has now; ``present`` is False if the image has
        no list.

    Raises:
        UsageError: The sector for the descriptor of the list already holds other data.
        CorruptImageError: The tables are damaged, so no list was written.
        NeedsCheckError: The image is too large for the scan for free clusters.
        QedError: The image cannot be opened for writing, or a system call failed.
    """
    options = options or OpenOptions()
    disk = await _set_free_list(path, replace(options, free_list="on"))
    info = await describe_free_list(path, lock=options.read_lock)
    if not info.present:
        if disk.damaged:
            raise damaged_error(disk, "no list was stored")
        error = disk.space_error or disk.free_list_error
        if error is not None:
            raise error
    return info


async def drop(path: str, options: OpenOptions | None = None) -> None:
    """Remove the list, if any, so that programs without support for free lists can open the image.

    Programs without support then count the clusters that were in the list as leaked.

    Args:
        path: The image.
        options: How to open the image; ``writable`` and ``free_list`` are ignored.

    Raises:
        QedError: The image cannot be opened for writing, or a system call failed.
    """
    await _set_free_list(path, replace(options or OpenOptions(), free_list="off"))


async def _set_free_list(path: str, options: OpenOptions) -> Disk:
    """Open an image for writing and close it; return the closed disk.

    ``free_list`` decides what becomes of its list.
    """
    async with open_writable(path, options, with_bases=False) as disk:
        pass
    return disk
