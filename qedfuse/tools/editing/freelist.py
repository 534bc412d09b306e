"""Enabling and dropping the persistent free list of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.disk.options import OpenOptions
from qedfuse.tools.common.writabledisk import open_writable
from qedfuse.tools.inspection.freelistinfo import describe_free_list

if TYPE_CHECKING:
    from qedfuse.tools.inspection.freelistinfo import FreeListInfo


async def enable(path: str, options: OpenOptions | None = None) -> FreeListInfo:
    """Find the free clusters of an image, punch them out of its file, and list them.

    Without a free cluster no list is written, and programs that do not know it can still
    open the image.  Once written the list is kept: a mount with default options rewrites it.

    Returns:
        The list that the image has afterwards.

    Raises:
        UsageError: The image has something else at the offset of the list's descriptor.
        QedError: The image cannot be opened for writing.
    """
    await _set_free_list(path, replace(options or OpenOptions(), free_list="on"))
    return await describe_free_list(path)


async def drop(path: str, options: OpenOptions | None = None) -> None:
    """Remove the list from an image, so that programs that do not know it can open it again.

    A check by such a program then counts the listed clusters as leaked; qedfuse finds them by
    its scan.

    Raises:
        QedError: The image cannot be opened for writing.
    """
    await _set_free_list(path, replace(options or OpenOptions(), free_list="off"))


async def _set_free_list(path: str, options: OpenOptions) -> None:
    """Open and close an image for writing: closing writes or removes the list, by the options."""
    async with open_writable(path, options, with_bases=False):
        pass
