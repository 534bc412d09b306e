"""A regular file of the host, by way of pread(2), pwrite(2), fallocate(2) and fdatasync(2)."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

from qedfuse.errors import HostError
from qedfuse.hostio.inodelock import InodeLock
from qedfuse.hostio.nowaitretry import NowaitRetry, loop
from qedfuse.hostio.regular import open_regular, status_of
from qedfuse.ondisk.constants import MAX_OFFSET
from qedfuse.text import printable
from qedfuse.util.adaptivepoll import AdaptivePoll

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer

T = TypeVar("T")
Args = TypeVarTuple("Args")

INLINE_BYTES: Final = 1 << 18
"""Writes up to this many bytes are copied to the page cache without leaving the event
loop: a hop to a worker thread costs more than the copy."""
MOST_INLINE_BYTES: Final = 1 << 20
"""The same as long as the host takes the longer ones at once.  When its memory is full of
data that waits for the disk, it makes writers wait."""
_AT_ONCE_SECONDS: Final = 1e-3
_THROTTLED_SECONDS: Final = 8e-3
"""A short write that takes longer may have been made to wait by the kernel: its shortest
pause for those who dirty pages faster than the disk takes them is 10 ms."""
_MAX_INLINE_DATASYNC_BYTES: Final = 1 << 21
"""Most that may have been written since the last datasync for the next one to be inline."""

_NOWAIT: Final = os.RWF_NOWAIT
_TRY_AGAIN: Final = (errno.EAGAIN, errno.EOPNOTSUPP)
_MAX_PARTS: Final = 1024  # IOV_MAX
_KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE
_PUNCH_HOLE: Final = 3  # FALLOC_FL_PUNCH_HOLE, which must come with the former
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = getattr(_libc, "fallocate64", None) or _libc.fallocate  # musl has one name only
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Change how a range of a file is stored (fallocate(2)); lets other threads run.

    Raises:
        OSError: The kernel refused.
    """
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


class PosixFile:
    """A regular file, by way of pread(2) and pwrite(2).

    What is in the host's page cache is read in the event loop (``RWF_NOWAIT``); what is
    not goes to a worker thread, so that other requests go on.

    The event loop changes the file inline only while no worker thread does and the kernel
    does not throttle short writes (`InodeLock`).
    """

    def __init__(self, fd: int, path: str, *, writable: bool) -> None:
        """Take over an open descriptor; ``path`` is what the user called the file."""
        self.fd = fd
        self.path = path
        self.name = printable(path)
        self.writable = writable
        self.can_punch = True
        self._can_reserve = True
        self._nowait = True
        self._arrivals = NowaitRetry()
        self._syncs = AdaptivePoll(_AT_ONCE_SECONDS)
        self._at_once = AdaptivePoll(_AT_ONCE_SECONDS, start_enabled=True)
        self._inode = InodeLock()
        self._unsynced = 0  # bytes written since the last datasync began

    @classmethod
    def open(cls, path: str, *, writable: bool = False, dir_fd: int | None = None) -> PosixFile:
        """Open a regular file without ever waiting for a FIFO or waking a device.

        Raises:
            HostError: It cannot be opened.
            ImageError: It is not a regular file.
        """
        access = os.O_RDWR if writable else os.O_RDONLY
        fd = open_regular(path, access, dir_fd=dir_fd)
        return cls(fd, path, writable=writable)

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes; fewer only where the file ends."""
        buffer = bytearray(length)
        count = await self.pread_into(offset, memoryview(buffer))
        if count < length:
            del buffer[count:]
        return buffer

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view``; return how many bytes there were before the file ended."""
        done = self._read_cached(offset, view)
        if done is None and self._nowait:
            error: HostError | None = None

            def ready() -> bool:
                nonlocal done, error
                try:
                    done = self._read_cached(offset, view)
                except HostError as failed:
                    error = failed
                return done is not None or error is not None

            async def in_thread() -> None:
                nonlocal done
                done = await self._in_thread("read", self._read_rest, offset, view, 0)

            await self._arrivals.wait(ready, in_thread)
            if error is not None:
                raise error
        if done is not None and done == len(view):
            return done
        # The page cache has only part of it, or the file ends: only waiting tells.
        return await self._in_thread("read", self._read_rest, offset, view, done or 0)

    def _read_cached(self, offset: int, view: memoryview) -> int | None:
        """Read what is in the page cache; None if that is nothing, and it is being fetched."""
        try:
            return os.preadv(self.fd, (view,), offset, _NOWAIT) if self._nowait else None
        except OSError as error:
            if error.errno not in _TRY_AGAIN:
                raise self._failed(error, "read") from error
            # A file system without RWF_NOWAIT says so at the first try, for good.
            self._nowait = error.errno != errno.EOPNOTSUPP
            return None

    def _read_rest(self, offset: int, view: memoryview, done: int) -> int:
        """Read what is not in the page cache; runs in a worker thread."""
        while done < len(view):
            count = os.preadv(self.fd, (view[done:],), offset + done)
            if not count:
                break
            done += count
        return done

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache; if it is not filled, something is amiss."""
        try:
            return os.preadv(self.fd, (view,), offset, _NOWAIT) == len(view)
        except OSError:
            return False

    def is_short(self, length: int) -> bool:
        """Tell whether a write of so many bytes need not go to a thread."""
        return (not self._inode.holders or self._inode.is_free()) and self._is_quick(length)

    def _is_quick(self, length: int) -> bool:
        """Tell whether to copy so many bytes takes less than to call a thread."""
        return length <= INLINE_BYTES or (length <= MOST_INLINE_BYTES and self._at_once.seconds > 0)

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write what is short enough to be copied to the page cache in the event loop."""
        if not self.is_short(len(data)):
            return False
        since = time.perf_counter()
        try:
            return os.pwrite(self.fd, data, offset) == len(data)
        except OSError:
            return False
        finally:
            self._took(len(data), time.perf_counter() - since)

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write the parts one behind the other, as one write."""
        length = sum(map(len, parts))
        is_quick = self._is_quick(length)
        if is_quick and self._inode.holders:
            await self._inode.wait_for_short()
        if is_quick and self.is_short(length):
            try:
                seconds = self._write_all(offset, parts)
            except OSError as error:
                raise self._failed(error, "write") from error
        else:
            seconds = await self._change_in_thread(
                "write", self._write_all, offset, parts, is_short=is_quick
            )
        self._took(length, seconds)

    def _took(self, length: int, seconds: float) -> None:
        """Learn how long a write took."""
        self._unsynced += length
        if length > INLINE_BYTES:
            self._at_once.came(seconds, slept=False)
        if seconds <= _THROTTLED_SECONDS:
            if self._inode.is_throttled:
                self._inode.fast()
        elif length <= INLINE_BYTES:
            self._inode.slow(seconds)

    def _write_all(self, offset: int, parts: tuple[Buffer, ...]) -> float:
        """Write every byte, however little the host takes at a time; give the seconds it took."""
        since = time.perf_counter()
        left = [memoryview(part).cast("B") for part in parts if len(part)]
        while left:
            count = os.pwritev(self.fd, left[:_MAX_PARTS], offset)
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left and count:
                left[0] = left[0][count:]
        return time.perf_counter() - since

    async def datasync(self) -> None:
        """Make everything written so far, and the file's length, survive power loss."""
        since = time.perf_counter()
        is_little = self._unsynced <= _MAX_INLINE_DATASYNC_BYTES
        self._unsynced = 0
        if self._syncs.seconds and is_little and self._inode.is_free() and not loop.is_wanted():
            # It has been faster lately than a thread could be called, and nobody has to
            # wait for us meanwhile.
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                raise self._failed(error, "datasync") from error
            self._syncs.came(time.perf_counter() - since, slept=False)
        else:
            await self._in_thread("datasync", os.fdatasync, self.fd)
            self._syncs.came(time.perf_counter() - since, slept=True)

    def try_grow(self, size: int) -> bool:
        """Make the file longer: a matter of some microseconds, as nothing is cut off."""
        if not self._inode.is_free():
            return False
        try:
            os.ftruncate(self.fd, size)
        except OSError:
            return False
        return True

    async def truncate(self, size: int) -> None:
        """Set the file's length; what is added reads as zeros."""
        await self._change_in_thread("truncate", os.ftruncate, self.fd, size)

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Give the space of ranges back to the host; afterwards they read as zeros."""
        if self.can_punch:
            self.can_punch = await self._fallocate("punch", _PUNCH_HOLE, *ranges)

    async def reserve(self, offset: int, length: int) -> None:
        """Make sure that later writes to a range inside the file find room."""
        if self._can_reserve:
            self._can_reserve = await self._fallocate("reserve", _KEEP_SIZE, (offset, length))

    async def _fallocate(self, action: str, mode: int, *ranges: tuple[int, int]) -> bool:
        """Call fallocate(2), which Python lacks; tell whether the file system knows the mode."""
        try:
            await self._change_in_thread(action, self._fallocate_all, mode, ranges)
        except HostError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    def _fallocate_all(self, mode: int, ranges: tuple[tuple[int, int], ...]) -> None:
        """Do it to each range; runs in a worker thread."""
        for offset, length in ranges:
            fallocate(self.fd, mode, offset, length)

    async def next_data(self, offset: int) -> int | None:
        """Find where the first data at or past ``offset`` begins; None if only holes follow."""
        return await self._seek(offset, os.SEEK_DATA)

    async def next_hole(self, offset: int) -> int | None:
        """Find where the first hole at or past ``offset`` begins; the file's end is one."""
        return await self._seek(offset, os.SEEK_HOLE)

    async def _seek(self, offset: int, whence: int) -> int | None:
        """Call lseek(2); None if what is looked for does not come any more."""
        if offset > MAX_OFFSET:
            return None
        try:
            if self._inode.is_free():
                return os.lseek(self.fd, offset, whence)
            # Some file systems take the inode's lock for it.
            return await trio.to_thread.run_sync(os.lseek, self.fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno == errno.EINVAL:  # a file system that keeps no holes
                size = self.size()
                return None if offset >= size else offset if whence == os.SEEK_DATA else size
            raise self._failed(error, "seek") from error

    def size(self) -> int:
        """Give the file's length now.

        Raises:
            HostError: The host refused.
        """
        return self.stat().st_size

    def stat(self) -> os.stat_result:
        """Give the file's attributes now.

        Raises:
            HostError: The host refused.
        """
        return status_of(self.fd, self.name)

    def statvfs(self) -> os.statvfs_result:
        """Describe the host's file system that holds the file.

        Raises:
            OSError: It cannot be asked.
        """
        return os.fstatvfs(self.fd)

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the file's times, in nanoseconds since 1970.

        Raises:
            OSError: The file belongs to another user.
        """
        set_times = partial(os.utime, self.fd, ns=(atime_ns, mtime_ns))
        if self._inode.is_free():
            set_times()
        else:
            await self._inode.in_thread(set_times)

    def close(self) -> None:
        """Let the file go, and with it every lock taken through it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _failed(self, error: OSError, action: str) -> HostError:
        return HostError.from_os(error, self.name, action)

    async def _change_in_thread(
        self,
        action: str,
        function: Callable[[*Args], T],
        *args: *Args,
        is_short: bool = False,
    ) -> T:
        """Do what `_in_thread` does with a call that changes the file."""
        try:
            return await self._inode.in_thread(function, *args, is_short=is_short)
        except OSError as error:
            raise self._failed(error, action) from error

    async def _in_thread(self, action: str, function: Callable[[*Args], T], *args: *Args) -> T:
        """Run a system call that may wait for the disk, without stopping other requests."""
        try:
            return await trio.to_thread.run_sync(function, *args)
        except OSError as error:
            raise self._failed(error, action) from error
