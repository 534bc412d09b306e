"""Enabling and dropping the persistent free list of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.tools.inspection.freelistinfo import describe_free_list

if TYPE_CHECKING:
    from qedfuse.tools.inspection.freelistinfo import FreeListInfo


async def enable(path: str, options: OpenOptions | None = None) -> FreeListInfo:
    """Find the free clusters of an image, give them back to the host, and list them.

    Without a single free cluster there is no list, and older programs can still open the
    image.  From then on the list is kept: a mount with default options writes it again.

    Raises:
        UsageError: Something else lies where the list's descriptor has to be.
        QedError: The image cannot be opened for writing.
    """
    wanted = replace(options or OpenOptions(), writable=True, free_list="on")
    async with open_disk(path, wanted, inspector=inspect_image, with_bases=False):
        pass
    return await describe_free_list(path)


async def drop(path: str, options: OpenOptions | None = None) -> None:
    """Drop the list of an image, so that older programs can open it again.

    What was listed is then what they call leaked; we find it by a scan.

    Raises:
        QedError: The image cannot be opened for writing.
    """
    unwanted = replace(options or OpenOptions(), writable=True, free_list="off")
    async with open_disk(path, unwanted, inspector=inspect_image, with_bases=False):
        pass
