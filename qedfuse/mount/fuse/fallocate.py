"""The requests about space: fallocate(2) and lseek(2) with SEEK_DATA and SEEK_HOLE.

With the write-back cache a hole is never reported over data that the kernel still keeps
to itself: before the answer, the kernel is made to write back the range in question, and
the disk is asked again.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pyfuse3
from pyfuse3 import FUSEError

from qedfuse.errors import QedError

if TYPE_CHECKING:
    import trio

    from qedfuse.disk.disk import Disk
    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.fuse.laundering import Laundering
    from qedfuse.mount.fuse.operations import Operations

_log = logging.getLogger(__name__)

# linux/falloc.h
_ALLOCATE: Final = 0
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10


class SpaceRequests:
    """Answers the two requests, each in a task of its own."""

    def __init__(
        self, operations: Operations, nursery: trio.Nursery, laundering: Laundering
    ) -> None:
        """Work for the disks of ``operations``, in tasks of ``nursery``."""
        self._operations = operations
        self._nursery = nursery
        self._laundering = laundering

    def __call__(
        self,
        request: Request,
        operation: str,
        uid: int,
        inode: int,
        mode: int,
        start: int,
        length: int,
    ) -> None:
        """Take a request; the answer comes at once or later."""
        if operation == "lseek" and self._try_seek(request, uid, inode, mode, start):
            return
        self._nursery.start_soon(self._answer, request, operation, uid, inode, mode, start, length)

    def _try_seek(self, request: Request, uid: int, inode: int, whence: int, start: int) -> bool:
        """Answer lseek(2) if nothing has to be waited for; tell whether it was."""
        operations = self._operations
        view = operations.views.get(inode)
        if operations.debug or view is None or self._may_be_dirty(view):
            return False
        if whence not in {os.SEEK_DATA, os.SEEK_HOLE} or not 0 <= start < view.disk.size:
            return False
        try:
            operations.admit(uid)
            found = view.disk.try_seek(start, data=whence == os.SEEK_DATA)
        except FUSEError:
            return False
        if found is None:
            return False
        if whence == os.SEEK_DATA and found == view.disk.size:
            request.error(errno.ENXIO)
        else:
            request.offset(found)
        return True

    async def _answer(
        self,
        request: Request,
        operation: str,
        uid: int,
        inode: int,
        mode: int,
        start: int,
        length: int,
    ) -> None:
        """Carry a request out and answer it, whatever happens.

        If the task is cancelled, the request goes without an answer of ours, and answers
        itself.
        """
        if self._operations.debug:
            _log.debug("%s%s", operation, (inode, mode, start, length))
        try:
            self._operations.admit(uid)
            view = self._operations.view(inode)
            if operation == "lseek":
                request.offset(await self._seek(view, mode, start))
            else:
                await self._allocate(view, mode, start, length)
                request.error(0)
        except FUSEError as error:
            request.error(error.errno)
        except QedError as error:
            self._operations.errors.error(inode, error)
            request.error(error.errno)
        except Exception as error:  # noqa: BLE001  the kernel must get an answer
            self._operations.errors.bug(inode, operation, error)
            request.error(errno.EIO)

    async def _allocate(self, view: ExportedDisk, mode: int, start: int, length: int) -> None:
        """Answer fallocate(2)."""
        disk = view.disk
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
        if mode == _KEEP_SIZE and end > size:
            # An image has no clusters past the end of its disk.
            raise FUSEError(errno.EOPNOTSUPP if self._operations.growable else errno.ENOSPC)
        carry_out = disk.allocate if mode in {_ALLOCATE, _KEEP_SIZE} else disk.discard
        if end <= size or mode & _KEEP_SIZE:
            await carry_out(start, length)
            return
        if not self._operations.growable:
            raise FUSEError(errno.ENOSPC)
        if mode == _ALLOCATE and start < size:
            # If the host has no room even for this, the disk keeps its size.
            await disk.allocate(start, size - start)
        await self._operations.grow(view, end)
        try:
            await carry_out(start, length)
        except QedError:
            # The disk stays larger, and the kernel learns of it only from an answer.
            self._operations.size_lost(view)
            with suppress(OSError):
                pyfuse3.invalidate_inode(view.inode, attr_only=True)
            raise

    async def _seek(self, view: ExportedDisk, whence: int, start: int) -> int:
        """Answer lseek(2).

        While the kernel may hold dirty pages, it writes back the range that is going to be
        reported as a hole, and the tables are looked at again.
        """
        if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise FUSEError(errno.EINVAL)
        if start < 0:
            raise FUSEError(errno.ENXIO)
        disk = view.disk
        gap = await _find_gap(disk, whence, start)
        while self._may_be_dirty(view):
            hole, end = gap
            if end is None and not self._operations.growable:
                end = disk.size
            # On a growable disk the kernel may hold data past the end that we know of, and
            # only the kernel knows where that data ends: the range then has no end.
            if end is not None and hole >= end:
                break
            if not await self._laundering.launder(view, hole, end):
                return self._assume_data(view, whence, start)
            before, gap = gap, await _find_gap(disk, whence, start)
            if gap == before:
                break
        hole, data = gap
        found = hole if whence == os.SEEK_HOLE else data
        if found is None or start >= disk.size:
            raise FUSEError(errno.ENXIO)
        return found

    def _assume_data(self, view: ExportedDisk, whence: int, start: int) -> int:
        """Answer lseek(2) when dirty pages cannot be written back: everything is data.

        Zeros that are reported as data cost space in a copy; data reported as a hole is lost.
        Where nobody knows the end of the data, the answer is an error, so that a copy fails.
        """
        size = view.disk.size
        growable = self._operations.growable
        if start < size:
            return start if whence == os.SEEK_DATA else size
        if whence == os.SEEK_DATA and growable:
            return start
        raise FUSEError(errno.EIO if growable else errno.ENXIO)

    def _may_be_dirty(self, view: ExportedDisk) -> bool:
        """Tell whether the kernel may have data of a disk that we have not been given.

        It gives us all when the last handle that may write is released.
        """
        return self._operations.enable_writeback_cache and view.writers > 0


async def _find_gap(disk: Disk, whence: int, start: int) -> tuple[int, int | None]:
    """Find the hole that lseek(2) asks about: its start, and where data follows, if any does."""
    hole = start
    if whence == os.SEEK_HOLE and start < disk.size:
        hole = await disk.next_hole(start)
    return hole, await disk.next_data(hole)
