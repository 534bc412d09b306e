"""The requests that pyfuse3 lacks: fallocate(2), and lseek(2) with SEEK_DATA and SEEK_HOLE.

The kernel may have changed pages that it has not sent to the server: pages of the write-back
cache, and pages that a program has changed by a shared memory map.  The server must not report a
hole where such data is.  So before the server reports a hole, the server makes the kernel write
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

# Modes of fallocate(2), from linux/falloc.h.
_ALLOCATE: Final = 0
_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10


class FallocateLseek:
    """Answers fallocate and lseek requests, each in a task of its own.

    If `may_seek` permits it, and the tables that an lseek needs are in memory, the extension itself
    answers the lseek (`_seek.c`).
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
            nursery: Runs the tasks.  The caller must cancel the nursery before the connection to
                the kernel is closed.
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
        """Start a task that answers a request.

        The arguments are those of `qedfuse.mount.fuse.extraops.Handler`.
        """
        self._nursery.start_soon(self._answer, request, operation, uid, inode, mode, start, length)

    def may_seek(self, uid: int, inode: int) -> bool:
        """Return whether the extension may answer an lseek of a user without calling this object.

        Returns False if the user is refused, if the kernel may have dirty pages of the disk, or if
        there is no such disk.
        """
        exported = self._operations.disks.get(inode)
        if exported is None or self._may_be_dirty(exported):
            return False
        try:
            self._operations.admit(uid)
        except FUSEError:
            return False
        return True

    async def _answer(
        self, request: Request, operation: str, *values: *tuple[int, int, int, int, int]
    ) -> None:
        """Carry out a request and answer it; an exception becomes the errno of the answer.

        If the task is cancelled, the request is answered with EINTR when the object ``request``
        is freed.  ``values`` has the arguments of `__call__` from ``uid`` on.
        """
        uid, inode, mode, start, length = values
        if self._operations.debug:
            _log.debug("%s%s", operation, (inode, mode, start, length))
        try:
            self._operations.admit(uid)
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

        Args:
            exported: The disk.
            mode: The mode of fallocate(2).
            start: Guest offset of the range.
            length: Bytes of the range, more than 0.

        Raises:
            FUSEError: EOPNOTSUPP, the mode is not supported, or would allocate clusters past the
                end of a growable disk and keep its size.  EROFS, the disk is read-only.  ENOSPC,
                the range goes past the end of a disk that cannot grow, and the mode is not a
                discard that keeps the size.  EFBIG, the tables cannot address the end of the
                range.
            QedError: The disk could not be changed.  Part of the range may be changed, and the
                disk may have grown.
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
            # An image has no clusters past the end of its disk, so the server cannot allocate
            # clusters there and keep the size of the disk.
            raise FUSEError(errno.EOPNOTSUPP if growable else errno.ENOSPC)
        carry_out = disk.allocate if mode in {_ALLOCATE, _KEEP_SIZE} else disk.discard
        if end <= size or mode & _KEEP_SIZE:
            await carry_out(start, length)
            return
        if not growable:
            raise FUSEError(errno.ENOSPC)
        if mode == _ALLOCATE and start < size:
            # The part before the end is allocated before the disk grows.  So if the host has no
            # space for this part, the disk keeps its size.
            await disk.allocate(start, size - start)
        await self._operations.grow(exported, end)
        try:
            await carry_out(start, length)
        except QedError:
            # The disk stays larger, but the kernel increases its cached size only after a
            # success.  So the cached size must be corrected.
            self._size_fixup.request(exported)
            with suppress(OSError):  # the kernel may have forgotten the inode
                pyfuse3.invalidate_inode(exported.inode, attr_only=True)
            raise

    async def _seek(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the guest offset for lseek(2).

        While the kernel may have dirty pages, the server makes the kernel write back the range
        that would be reported as a hole, and searches the tables again.

        Args:
            exported: The disk.
            whence: SEEK_DATA or SEEK_HOLE.
            start: Guest offset at which the search begins.

        Raises:
            FUSEError: EINVAL, ``whence`` is neither SEEK_DATA nor SEEK_HOLE.  ENXIO, ``start`` is
                negative or not before the end of the disk, or SEEK_DATA finds no data.  If dirty
                pages cannot be written back, the result and the errors are those of `_assume_data`.
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
            if end is None and not self._operations.may_grow(exported):
                end = disk.size
            # On a growable disk the kernel may have cached data past the end of the disk, and
            # only the kernel knows where that data ends.  So ``end`` stays None.
            if end is not None and hole >= end:
                # The gap is empty, so no range would be reported as a hole.
                break
            if not await self._laundering.launder(exported, hole, end):
                return self._assume_data(exported, whence, start)
            before, gap = gap, await _find_gap(disk, whence, start)
            if gap == before:
                # The kernel has written back all dirty pages of the gap, and the tables still
                # have no data there.  So the gap is a hole.
                break
        hole, data = gap
        offset = hole if whence == os.SEEK_HOLE else data
        if offset is None or start >= disk.size:
            raise FUSEError(errno.ENXIO)
        return offset

    def _assume_data(self, exported: ExportedDisk, whence: int, start: int) -> int:
        """Return the guest offset for lseek(2) as if the whole disk were data.

        This is the answer of `_seek` if dirty pages cannot be written back.  Zeros that are
        reported as data only make a copy larger, but a copy loses data that is reported as a hole.

        Raises:
            FUSEError: ENXIO, ``start`` is at or past the end of a disk that cannot grow.  EIO, a
                hole is searched at or past the end of a growable disk.  The server does not know
                where the data in the kernel's cache ends, and a copy must fail rather than lose
                this data.
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

        If no handle that may write is open, the kernel has no dirty pages, because it sends all
        dirty pages before it releases the last handle that may write.
        """
        return self._operations.has_page_cache and exported.writers > 0


async def _find_gap(disk: Disk | DiskWindow, whence: int, start: int) -> tuple[int, int | None]:
    """Return the gap that SEEK_HOLE would report as a hole, or that SEEK_DATA would skip.

    Returns:
        The guest offsets at which the gap starts and ends.  The gap ends at the next data; if no
        data follows, the second offset is None.  For SEEK_HOLE the gap starts at the first hole at
        or past ``start``; the end of the disk counts as a hole.  For SEEK_DATA, or if ``start`` is
        not before the end of the disk, the gap starts at ``start``, and is empty if there is data
        at ``start``.
    """
    hole = start
    if whence == os.SEEK_HOLE and start < disk.size:
        hole = await disk.next_hole(start)
    return hole, await disk.next_data(hole)
