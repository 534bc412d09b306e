"""The requests that pyfuse3 lacks: fallocate(2), and lseek(2) with SEEK_DATA and SEEK_HOLE.

With the write-back cache a hole must not be reported over data that the kernel has cached
and not sent yet.  So before the reply the kernel is made to write back the range in question,
and the disk is queried again.
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
    from qedfuse.mount.fuse.sizefixup import SizeFixup

_log = logging.getLogger(__name__)

# Modes of fallocate(2), from linux/falloc.h.
_ALLOCATE: Final = 0
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10


class FallocateLseek:
    """Answers fallocate and lseek requests, each in a task of its own if it has to wait."""

    def __init__(
        self,
        operations: Operations,
        laundering: Laundering,
        size_fixup: SizeFixup,
        nursery: trio.Nursery,
    ) -> None:
        """Serve the disks of ``operations``.

        Args:
            operations: The other requests of the mount.
            laundering: Makes the kernel write back its dirty pages.
            size_fixup: Is notified when the kernel may have a wrong size of a disk.
            nursery: For the tasks.
        """
        self._operations = operations
        self._laundering = laundering
        self._size_fixup = size_fixup
        self._nursery = nursery

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
        """Answer a request, now or in a task (`qedfuse.mount.fuse.extraops.Handler`)."""
        if operation == "lseek" and self._try_seek(request, uid, inode, mode, start):
            return
        self._nursery.start_soon(self._answer, request, operation, uid, inode, mode, start, length)

    def _try_seek(self, request: Request, uid: int, inode: int, whence: int, start: int) -> bool:
        """Answer lseek(2) without waiting; return False, without an answer, if it would wait."""
        operations = self._operations
        exported = operations.disks.get(inode)
        if operations.debug or exported is None or self._may_be_dirty(exported):
            return False
        if whence not in {os.SEEK_DATA, os.SEEK_HOLE} or not 0 <= start < exported.disk.size:
            return False
        try:
            operations.admit(uid)
            found = exported.disk.try_seek(start, data=whence == os.SEEK_DATA)
        except FUSEError:
            return False
        if found is None:
            return False
        if whence == os.SEEK_DATA and found == exported.disk.size:
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
        """Carry out a request and answer it, also after any exception.

        If the task is cancelled, it gives no answer, and the request answers itself when it is
        freed.
        """
        if self._operations.debug:
            _log.debug("%s%s", operation, (inode, mode, start, length))
        try:
            self._operations.admit(uid)
            exported = self._operations.disk_of(inode)
            if operation == "lseek":
                request.offset(await self._seek(exported, mode, start))
            else:
                await self._allocate(exported, mode, start, length)
                request.error(0)
        except Exception as error:  # noqa: BLE001  the kernel must get an answer
            request.error(self._operations.errors.to_errno(inode, operation, error))

    async def _allocate(self, exported: ExportedDisk, mode: int, start: int, length: int) -> None:
        """Carry out fallocate(2)."""
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
        growable = self._operations.growable
        if mode == _KEEP_SIZE and end > size:
            # An image has no clusters past the end of its disk.
            raise FUSEError(errno.EOPNOTSUPP if growable else errno.ENOSPC)
        carry_out = disk.allocate if mode in {_ALLOCATE, _KEEP_SIZE} else disk.discard
        if end <= size or mode & _KEEP_SIZE:
            await carry_out(start, length)
            return
        if not growable:
            raise FUSEError(errno.ENOSPC)
        if mode == _ALLOCATE and start < size:
            # If the host has not even the space for this part, the disk keeps its size.
            await disk.allocate(start, size - start)
        await self._operations.grow(exported, end)
        try:
            await carry_out(start, length)
        except QedError:
            # The disk stays larger, and the kernel learns its size only from a reply.
            self._size_fixup.request(exported)
            with suppress(OSError):
                pyfuse3.invalidate_inode(exported.inode, attr_only=True)
            raise

    async def _seek(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the offset for lseek(2).

        While the kernel may have dirty pages, it is made to write back the range that would be
        reported as a hole, and the tables are searched again.
        """
        if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
            raise FUSEError(errno.EINVAL)
        if start < 0:
            raise FUSEError(errno.ENXIO)
        disk = exported.disk
        gap = await _find_gap(disk, whence, start)
        while self._may_be_dirty(exported):
            hole, end = gap
            if end is None and not self._operations.growable:
                end = disk.size
            # On a growable disk the kernel may have data past the end that the server knows,
            # and only the kernel knows where that data ends: the range then has no end.
            if end is not None and hole >= end:
                break
            if not await self._laundering.launder(exported, hole, end):
                return self._assume_data(exported, whence, start)
            before, gap = gap, await _find_gap(disk, whence, start)
            if gap == before:
                break
        hole, data = gap
        found = hole if whence == os.SEEK_HOLE else data
        if found is None or start >= disk.size:
            raise FUSEError(errno.ENXIO)
        return found

    def _assume_data(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the offset for lseek(2) if dirty pages cannot be written back: all is data.

        Zeros that are reported as data cost space in a copy; data that is reported as a hole
        is lost.  If the end of the data is unknown, the reply is an error, so that a copy fails.
        """
        size = exported.disk.size
        growable = self._operations.growable
        if start < size:
            return start if whence == os.SEEK_DATA else size
        if whence == os.SEEK_DATA and growable:
            return start
        raise FUSEError(errno.EIO if growable else errno.ENXIO)

    def _may_be_dirty(self, exported: ExportedDisk) -> bool:
        """Return whether the kernel may have cached data of a disk that it has not sent yet.

        It sends all of it when the last handle that may write is released.
        """
        return self._operations.enable_writeback_cache and exported.writers > 0


async def _find_gap(disk: Disk, whence: int, start: int) -> tuple[int, int | None]:
    """Return the start of the hole for lseek(2), and of the data after it; None for no data."""
    hole = start
    if whence == os.SEEK_HOLE and start < disk.size:
        hole = await disk.next_hole(start)
    return hole, await disk.next_data(hole)
