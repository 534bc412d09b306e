"""The requests that pyfuse3 lacks: fallocate(2), and lseek(2) with SEEK_DATA and SEEK_HOLE.

The kernel may hold changed pages that it has not yet sent to the server, because of the write-back
cache or of a shared memory map.  So before the server reports a hole, it makes the kernel write
back the range of the hole, and searches the tables again.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Final

import pyfuse3
from pyfuse3 import FUSEError

from qedfuse.errors import QedError
from qedfuse.mount.fuse.requestcounters import DISCARD

if TYPE_CHECKING:
    import trio

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.window import DiskWindow
    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.fuse.laundering import Laundering
    from qedfuse.mount.fuse.operations import Operations
    from qedfuse.mount.fuse.sizefixup import SizeFixup

_log = logging.getLogger(__name__)

_MAX_LOCK_SECONDS: Final = 1.0
"""Maximum time that a search waits while the kernel writes back pages for another search."""

# Modes of fallocate(2), from linux/falloc.h.
_ALLOCATE: Final = 0
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10


class FallocateLseek:
    """Answers fallocate and lseek requests, each in a task of its own.

    The user of a request is not looked at: it needs an open descriptor, and `Operations.open` has
    checked the user who opened the file.

    The mount's extension in C answers an lseek itself if it can (`may_seek`, `_seek.c`).
    """

    def __init__(
        self,
        operations: Operations,
        laundering: Laundering,
        size_fixup: SizeFixup,
        nursery: trio.Nursery,
    ) -> None:
        """Serve the disks of ``operations``.

        Args:
            operations: The handlers of the other requests of the mount.
            laundering: Makes the kernel write back its dirty pages.
            size_fixup: Gets a request when the kernel may have cached a wrong size of a disk.
            nursery: Runs the tasks; cancel it before the connection to the kernel is closed.
        """
        self._operations = operations
        self._laundering = laundering
        self._size_fixup = size_fixup
        self._nursery = nursery

    def __call__(
        self,
        request: Request,
        operation: str,
        inode: int,
        mode: int,
        start: int,
        length: int,
    ) -> None:
        """Start a task that answers a request; see `qedfuse.mount.fuse.extraops.Handler`."""
        self._nursery.start_soon(self._answer, request, operation, inode, mode, start, length)

    def may_seek(self, inode: int) -> bool:
        """Return whether the extension may answer an lseek itself.

        Returns False if the kernel may have dirty pages, and for an unknown file.
        """
        exported = self._operations.disks.get(inode)
        return exported is not None and not self._may_be_dirty(exported)

    async def _answer(
        self, request: Request, operation: str, *values: *tuple[int, int, int, int]
    ) -> None:
        """Carry out a request and answer it; an exception becomes the errno of the answer.

        If the task is cancelled, freeing ``request`` answers with EINTR.
        """
        inode, mode, start, length = values
        if self._operations.debug:
            _log.debug("%s%s", operation, (inode, mode, start, length))
        try:
            exported = self._operations.disk_of(inode)
            if operation == "lseek":
                request.offset(await self._seek(exported, mode, start))
            else:
                is_discard = mode & (_PUNCH_HOLE | _ZERO_RANGE)
                with exported.counters.counted(DISCARD, length) if is_discard else nullcontext():
                    await self._fallocate(exported, mode, start, length)
                request.error(0)
        except Exception as error:  # noqa: BLE001  the kernel must get an answer
            request.error(self._operations.errors.to_errno(inode, operation, error))

    async def _fallocate(self, exported: ExportedDisk, mode: int, start: int, length: int) -> None:
        """Carry out fallocate(2) on a range.

        After a `QedError` a part of the range may be changed, and the disk may have grown.
        """
        disk = exported.disk
        if mode not in {
            _ALLOCATE,
            _PUNCH_HOLE | _KEEP_SIZE,
            _ZERO_RANGE | _KEEP_SIZE,
            _ZERO_RANGE,
            _KEEP_SIZE,
        }:
            raise FUSEError(errno.EOPNOTSUPP)
        if not disk.writable:
            raise FUSEError(errno.EROFS)
        end, size = start + length, disk.size
        growable = self._operations.may_grow(exported)
        if mode == _KEEP_SIZE and end > size:
            # An image has no clusters past the end of its disk, so no space can be reserved there.
            raise FUSEError(errno.EOPNOTSUPP if growable else errno.ENOSPC)
        carry_out = disk.allocate if mode in {_ALLOCATE, _KEEP_SIZE} else disk.discard
        if end <= size or mode & _KEEP_SIZE:
            await carry_out(start, length)
            return
        if not growable:
            raise FUSEError(errno.ENOSPC)
        if mode == _ALLOCATE and start < size:
            # First the part inside the disk: if the host has no space for it, the disk keeps its
            # size.
            await disk.allocate(start, size - start)
        await self._operations.grow(exported, end)
        try:
            await carry_out(start, length)
        except QedError:
            # The disk stays larger, but the kernel increases its cached size only after a success.
            self._size_fixup.request(exported, may_shrink=False)
            with suppress(OSError):  # the kernel may have forgotten the inode
                pyfuse3.invalidate_inode(exported.inode, attr_only=True)
            raise

    async def _seek(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the guest offset for lseek(2)."""
        if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise FUSEError(errno.EINVAL)
        if start < 0:
            raise FUSEError(errno.ENXIO)
        disk = exported.disk
        written_back = None  # the gap whose dirty pages the kernel has written back
        while True:
            # The last handle that may write can be released during the search.  The kernel sends
            # its dirty pages before that, but perhaps to a place that was searched already.  So
            # what counts is whether there was such a handle before the search.
            may_be_dirty = self._may_be_dirty(exported)
            # The gap is the range that the answer would report as a hole, or would skip.
            gap = hole, end = await _find_gap(disk, whence, start)
            if not may_be_dirty or gap == written_back:
                # If all dirty pages of the gap were written back, and the tables still have no data
                # there, the gap is a hole.
                break
            if not self._may_be_dirty(exported):
                continue
            if end is None and not self._operations.may_grow(exported):
                end = disk.size
            # On a growable disk the kernel may have cached data past the end of the disk.  Only the
            # kernel knows where this data ends, so ``end`` stays None.
            if end is not None and hole >= end:
                # The gap is empty, so the answer reports no range as a hole and skips none.
                break
            # Until the reply, the kernel lets no program write to this disk.
            if not await self._laundering.launder(
                exported, hole, end, lock_seconds=_MAX_LOCK_SECONDS
            ):
                return self._assume_data(exported, whence, start)
            written_back = gap
        hole, data = gap
        offset = hole if whence == os.SEEK_HOLE else data
        if offset is None or start >= disk.size:
            raise FUSEError(errno.ENXIO)
        return offset

    def _assume_data(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the guest offset for lseek(2) if dirty pages cannot be written back.

        Zeros that are reported as data only make a copy larger.  Data that is reported as a hole is
        missing in the copy.  Past the end of a growable disk the server does not know where the
        kernel's data ends, so SEEK_HOLE fails with EIO there.
        """
        size = exported.disk.size
        growable = self._operations.may_grow(exported)
        if start < size:
            return start if whence == os.SEEK_DATA else size
        if whence == os.SEEK_DATA and growable:
            return start
        raise FUSEError(errno.EIO if growable else errno.ENXIO)

    def _may_be_dirty(self, exported: ExportedDisk) -> bool:
        """Return whether the kernel may have dirty pages of a disk.

        The kernel sends all dirty pages before it releases the last handle that may write.
        """
        return self._operations.has_page_cache and exported.writers > 0


async def _find_gap(disk: Disk | DiskWindow, whence: int, start: int) -> tuple[int, int | None]:
    """Return the range that SEEK_HOLE would report as a hole, or that SEEK_DATA would skip.

    The end is None if no data follows.  The range is empty if there is data at its beginning.
    """
    hole = start
    if whence == os.SEEK_HOLE and start < disk.size:
        hole = await disk.next_hole(start)
    return hole, await disk.next_data(hole)
