"""Attributes and changes of a regular file of the host, in the event loop or in a thread."""

from __future__ import annotations

import errno
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from qedfuse.errors import HostError, cannot_open
from qedfuse.hostio.hostcalls import host_calls
from qedfuse.hostio.inlinepolicy import InlinePolicy
from qedfuse.hostio.inodelock import InodeLock, acquire
from qedfuse.hostio.opendirectory import OpenDirectory
from qedfuse.hostio.pagesource import WriteTarget
from qedfuse.hostio.posixreader import PosixReader
from qedfuse.hostio.regular import identity_of, open_regular, status_of
from qedfuse.hostio.sparse import seek
from qedfuse.hostio.systemcalls import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    size_and_blocks,
    waits_for_server,
    write_all,
)
from qedfuse.ondisk.constants import MAX_OFFSET
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from qedfuse.hostio.hostfile import Buffer, FileIdentity

T = TypeVar("T")

_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of fallocate(2) on a file system that does not support the mode."""


class PosixFile(PosixReader):
    """A `HostFile` for a regular file, implemented with system calls.

    The event loop itself makes a write that is short by its `InlinePolicy`, if no thread is
    changing the file and the kernel does not throttle short writes (`InodeLock`).  Threads make all
    other changes, and all changes of a file on a server.
    """

    def __init__(
        self, fd: int, path: str, *, writable: bool, directory: OpenDirectory | None = None
    ) -> None:
        """Take over open files; ``path`` is the file's name as it was given (`PosixReader`)."""
        has_server = waits_for_server(fd)
        super().__init__(fd, path, has_server=has_server, directory=directory)
        self.writable = writable
        self.can_punch = True
        self._can_reserve = True
        self._inode = InodeLock(has_server=has_server)
        self._policy = InlinePolicy(self._inode)
        self._is_short = self._policy.is_short
        self._record_write = self._policy.record_write
        self.can_write_inline = self._policy.can_write_inline
        """Return whether `try_write` would try to write the given number of bytes now."""

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> PosixFile:
        """Open a regular file and the directory of its path; refuse a FIFO or a device.

        Raises:
            HostError: The file cannot be opened.
            ImageError: The file is not a regular file.
        """
        access = os.O_RDWR if writable else os.O_RDONLY
        # Without a name after the last slash, the path is that of a directory, or of nothing.
        parent, name = os.path.split(path)
        try:
            directory = OpenDirectory((parent or ".") if name else path)
        except OSError as error:
            raise cannot_open(path, error) from error
        try:
            fd = open_regular(name or ".", access, dir_fd=directory.fd, name=path)
        except BaseException:
            directory.close()
            raise
        return cls(fd, path, writable=writable, directory=directory)

    @property
    def identity(self) -> FileIdentity:
        """The device and the inode of the file."""
        return identity_of(self.stat())

    @property
    def write_target(self) -> WriteTarget | None:
        """What the mount's extension in C needs to write; None if the file is not writable."""
        if not self.writable:
            return None
        return WriteTarget(self.fd, self._inode, self._is_short, self._record_write)

    def size(self) -> int:
        """Return the file's length in bytes.

        Raises:
            HostError: A system call failed.
        """
        return self._size_and_blocks()[0]

    def stored_blocks(self) -> int:
        """Return the file's ``st_blocks``, in units of 512 bytes; see `size_and_blocks`.

        Raises:
            HostError: A system call failed.
        """
        return self._size_and_blocks()[1]

    def _size_and_blocks(self) -> tuple[int, int]:
        try:
            return size_and_blocks(self.fd)
        except OSError as error:
            raise self._failed(error, "stat") from error

    def stat(self) -> os.stat_result:
        """Return the file's attributes (fstat(2)).

        Raises:
            HostError: A system call failed.
        """
        return status_of(self.fd, self.name)

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system that holds the file (statvfs(3)).

        Raises:
            HostError: A system call failed.
        """
        try:
            return os.fstatvfs(self.fd)
        except OSError as error:
            raise self._failed(error, "statvfs") from error

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` at a file offset without blocking; return whether that succeeded.

        After False a part of ``data`` may have been written, and the caller must write all of it
        with `pwrite`.
        """
        if not self.can_write_inline(len(data)):
            return False
        since = time.perf_counter()
        try:
            return os.pwrite(self.fd, data, offset) == len(data)
        except OSError:
            return False
        finally:
            self._record_write(len(data), time.perf_counter() - since)

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write ``parts`` one after another, beginning at a file offset."""
        length = sum(map(len, parts))
        is_short = self._is_short(length)
        if is_short and self._inode.contention:
            await self._inode.wait_for_short_writes()
        if is_short and self.can_write_inline(length):
            try:
                seconds = write_all(self.fd, offset, parts)
            except OSError as error:
                raise self._failed(error, "write") from error
        else:
            seconds = await self._checked(
                "write",
                self._inode.in_thread(
                    host_calls().write, self.fd, offset, parts, is_short_write=is_short
                ),
            )
        self._record_write(length, seconds)

    def try_datasync(self) -> bool:
        """Make all earlier writes and the file's length durable, if that will probably be fast.

        After False nothing was done, so the caller must call `datasync`.

        Raises:
            HostError: A system call failed.
        """
        if not self._policy.can_datasync_inline():
            return False
        self._policy.begin_datasync()
        since = time.perf_counter()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise self._failed(error, "datasync") from error
        self._policy.record_datasync(time.perf_counter() - since, is_inline=True)
        return True

    async def datasync(self) -> None:
        """Make all earlier writes and the file's length durable (fdatasync(2))."""
        if self.try_datasync():
            return
        self._policy.begin_datasync()
        since = time.perf_counter()
        await self._checked("datasync", self._datasync_in_thread())
        self._policy.record_datasync(time.perf_counter() - since, is_inline=False)

    async def _datasync_in_thread(self) -> None:
        """Call fdatasync(2) in a thread."""
        await acquire(self._call_slots)
        try:
            await host_calls().datasync(self.fd)
        finally:
            self._call_slots.release()

    def try_grow(self, size: int) -> bool:
        """Make the file ``size`` bytes long without blocking; return whether that succeeded.

        ``size`` must not be less than the file's length.  After False the file is unchanged.
        """
        if not self._inode.recheck_free():
            return False
        try:
            os.ftruncate(self.fd, size)
        except OSError:
            return False
        return True

    async def truncate(self, size: int) -> None:
        """Make the file ``size`` bytes long; added bytes read as zeros."""
        change = self._inode.in_thread(host_calls().truncate, self.fd, size)
        await self._checked("truncate", change)

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Give the space of ``ranges`` back to the host; each range is an offset and a length.

        The ranges read as zeros afterwards.  If the file system cannot punch holes, nothing is
        done, and ``can_punch`` becomes False.
        """
        if self.can_punch:
            self.can_punch = await self._fallocate("punch", FALLOC_PUNCH_HOLE, *ranges)

    async def reserve(self, offset: int, length: int) -> None:
        """Reserve space for later writes to a range inside the file, if the file system can."""
        if self._can_reserve:
            self._can_reserve = await self._fallocate("reserve", FALLOC_KEEP_SIZE, (offset, length))

    async def _fallocate(self, action: str, mode: int, *ranges: tuple[int, int]) -> bool:
        """Call fallocate(2) for each range; return whether the file system supports the mode."""
        change = self._inode.in_thread(host_calls().fallocate, self.fd, mode, *ranges)
        try:
            await self._checked(action, change)
        except HostError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
        return True

    async def next_data(self, offset: int) -> int | None:
        """Return where the first data at or past ``offset`` begins; None if no data follows."""
        return await self._seek(offset, os.SEEK_DATA)

    async def next_hole(self, offset: int) -> int | None:
        """Return where the first hole at or past ``offset`` begins; the file's end counts as one.

        Returns None if ``offset`` is at or past the end of the file.
        """
        return await self._seek(offset, os.SEEK_HOLE)

    async def _seek(self, offset: int, whence: int) -> int | None:
        """Return where data or a hole begins, as `seek` does; None for an offset past `MAX_OFFSET`.

        Some file systems take the inode's lock in lseek(2).  So while a thread may hold this lock,
        lseek(2) is called in a thread as well.
        """
        if offset > MAX_OFFSET:
            return None
        try:
            if self._inode.recheck_free():
                return seek(self.fd, offset, whence)
            await acquire(self._call_slots)
            try:
                return await run_in_thread(seek, self.fd, offset, whence)
            finally:
                self._call_slots.release()
        except OSError as error:
            raise self._failed(error, "seek") from error

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the file's times of access and modification, in nanoseconds since 1970 (UTC).

        Raises:
            OSError: The file belongs to another user, or a system call failed.
            HostError: The host cannot start a thread.
        """
        set_times = partial(os.utime, self.fd, ns=(atime_ns, mtime_ns))
        if self._inode.recheck_free():
            set_times()
        else:
            await self._inode.in_thread(run_in_thread, set_times)

    async def _checked(self, action: str, call: Awaitable[T]) -> T:
        """Await a call; raise HostError, which names ``action``, if a system call fails."""
        try:
            return await call
        except OSError as error:
            raise self._failed(error, action) from error
