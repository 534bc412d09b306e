"""The requests that pyfuse3 lacks: fallocate(2), and lseek(2) with SEEK_DATA and SEEK_HOLE.

With the write-back cache, the kernel may have cached data that it has not sent to the server.
A hole must not be reported where such data is.  So before the server reports a hole, it makes
the kernel write back the range, and searches the tables again.
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
    """Answers fallocate and lseek requests; a request that may wait gets a task of its own."""

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
            size_fixup: Is notified when the kernel may have a wrong size of a disk.
            nursery: Runs the tasks; the caller must cancel it before the connection is closed.
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
        """Answer a request before returning, or start a task that answers it.

        The arguments are those of `qedfuse.mount.fuse.extraops.Handler`.
        """
        if operation == "lseek" and self._try_seek(request, uid, inode, mode, start):
            return
        self._nursery.start_soon(self._answer, request, operation, uid, inode, mode, start, length)

    def _try_seek(self, request: Request, uid: int, inode: int, whence: int, start: int) -> bool:
        """Answer lseek(2) without waiting.

        Returns:
            False if the request is not answered and needs the slow path, because the answer
            would wait, be an error, or must be logged.
        """
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
        """Carry out a request and answer it, with an error if an exception was raised.

        If the task is cancelled, the request is answered with EINTR when the object ``request``
        is freed.
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
        """Carry out fallocate(2).

        Raises:
            FUSEError: EOPNOTSUPP, the mode is not supported for this range; EROFS, the disk is
                read-only; ENOSPC, the range exceeds a disk that must not grow; EFBIG, the
                tables cannot address the size.
            QedError: The disk could not be changed; part of the range may be changed.
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
        growable = self._operations.growable
        if mode == _KEEP_SIZE and end > size:
            # An image has no clusters past the end of its disk, so none can be allocated there.
            raise FUSEError(errno.EOPNOTSUPP if growable else errno.ENOSPC)
        carry_out = disk.allocate if mode in {_ALLOCATE, _KEEP_SIZE} else disk.discard
        if end <= size or mode & _KEEP_SIZE:
            await carry_out(start, length)
            return
        if not growable:
            raise FUSEError(errno.ENOSPC)
        if mode == _ALLOCATE and start < size:
            # Allocated before the disk grows: if the host has no space for the part before the
            # end, the disk keeps its size.
            await disk.allocate(start, size - start)
        await self._operations.grow(exported, end)
        try:
            await carry_out(start, length)
        except QedError:
            # The disk stays larger, but the kernel gets an error in place of a reply with the
            # new size.  So the size that the kernel has cached must be corrected.
            self._size_fixup.request(exported)
            with suppress(OSError):
                pyfuse3.invalidate_inode(exported.inode, attr_only=True)
            raise

    async def _seek(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the offset for lseek(2).

        While the kernel may have dirty pages, the server makes it write back the range that
        would be reported as a hole, and searches the tables again.

        Raises:
            FUSEError: ENXIO, no data follows or ``start`` is not on the disk; EINVAL,
                ``whence`` is neither SEEK_DATA nor SEEK_HOLE; EIO, dirty pages cannot be
                written back and the end of the data is unknown.
            QedError: A table cannot be read.
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
            # On a growable disk the kernel may have cached data past the end of the disk, and
            # only the kernel knows where that data ends.  So the range is given without an end.
            if end is not None and hole >= end:
                break
            if not await self._laundering.launder(exported, hole, end):
                return self._assume_data(exported, whence, start)
            before, gap = gap, await _find_gap(disk, whence, start)
            if gap == before:
                # No data was written back to this gap, so it is a hole.
                break
        hole, data = gap
        found = hole if whence == os.SEEK_HOLE else data
        if found is None or start >= disk.size:
            raise FUSEError(errno.ENXIO)
        return found

    def _assume_data(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the offset for lseek(2) as if the whole disk were data.

        This is the answer if dirty pages cannot be written back.  If zeros are reported as
        data, a copy takes more space.  If data is reported as a hole, the copy loses the data.

        Raises:
            FUSEError: ENXIO, ``start`` is past the end of a disk that cannot grow.  EIO, a hole
                is searched past the end of a growable disk, and the server does not know where
                the data in the kernel's cache ends; so a copy fails.
        """
        size = exported.disk.size
        growable = self._operations.growable
        if start < size:
            return start if whence == os.SEEK_DATA else size
        if whence == os.SEEK_DATA and growable:
            return start
        raise FUSEError(errno.EIO if growable else errno.ENXIO)

    def _may_be_dirty(self, exported: ExportedDisk) -> bool:
        """Return whether the kernel may have dirty pages of a disk.

        Before the kernel releases the last handle that may write, it sends all dirty pages.
        """
        return self._operations.enable_writeback_cache and exported.writers > 0


async def _find_gap(disk: Disk, whence: int, start: int) -> tuple[int, int | None]:
    """Return the guest offsets where a hole starts and where the data after the hole starts.

    For SEEK_HOLE the first offset is that of the first hole from ``start`` on.  For SEEK_DATA
    it is ``start`` itself, and if data starts there, the second offset is the same.  The second
    offset is None if no data follows.
    """
    hole = start
    if whence == os.SEEK_HOLE and start < disk.size:
        hole = await disk.next_hole(start)
    return hole, await disk.next_data(hole)
