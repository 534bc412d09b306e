"""Reads of a regular file of the host: from the page cache in the event loop, or in a thread."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError
from qedfuse.hostio.hostcalls import host_calls
from qedfuse.hostio.inodelock import acquire
from qedfuse.hostio.nowaitretry import NowaitRetry
from qedfuse.hostio.pagesource import PageSource
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.hostio.systemcalls import inline_flags, read_all
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostcalls import HostCalls
    from qedfuse.hostio.opendirectory import OpenDirectory

_NOT_CACHED: Final = (errno.EAGAIN, errno.EOPNOTSUPP)
"""Errors of a read with RWF_NOWAIT: the data is not cached, or the flag is not supported."""
_MAX_WAITING_CALLS: Final = 28
"""Maximum number of calls on one file that wait in threads.  With the 4 changes that `InodeLock`
permits, a file on a disk that does not answer occupies at most 32 of the threads of all files."""


class PosixReader:
    """An open regular file and its reads, as `ReadableFile` describes them.

    The event loop reads data that is in the host's page cache (`inline_flags`).  Other reads go to
    a thread: a native thread of the extension, or else a thread of trio (`HostCalls`).  With native
    threads, some misses of the page cache make the next reads go to a thread directly
    (`ReadPolicy`).  With threads of trio, a read that missed is first retried for a moment
    (`NowaitRetry`).

    Attributes:
        fd: The descriptor; -1 after `close`.
        path: The file's name as the user or an image has given it.
        name: The file's name in messages.
        read_policy: Decides whether reads are tried in the event loop.
        directory: The directory in which the name of the file was looked up at its opening; None if
            it is not known, and after `close_directory`.
    """

    def __init__(
        self, fd: int, path: str, *, has_server: bool, directory: OpenDirectory | None = None
    ) -> None:
        """Take over open files; ``has_server`` is the result of `waits_for_server` for ``fd``."""
        self.fd = fd
        self.path = path
        self.directory = directory
        self.name = printable(path)
        self._flags = inline_flags(fd)
        self.read_policy = ReadPolicy(can_queue=bool(self._flags))
        if has_server:
            # A read could wait for the server although its pages are in the page cache: the kernel
            # may ask first whether they are still right.
            self.read_policy.disable_inline()
        # The file offset of the last read that `try_read` has not found in the page cache; -1 if
        # there is none, or if `pread_into` or `try_start_read` has begun a read since.
        self._missed_offset = -1
        self._call_slots = trio.Semaphore(_MAX_WAITING_CALLS)
        self._retry = NowaitRetry()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.fd

    @property
    def page_source(self) -> PageSource:
        """By what the mount's C extension reads the file: the descriptor, and the read policy."""
        return PageSource(self.read_policy, self.fd, flags=self._flags)

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes at a file offset; fewer only where the file ends."""
        buffer = bytearray(length)
        count = await self.pread_into(offset, memoryview(buffer))
        if count < length:
            del buffer[count:]
        return buffer

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only where the file ends.
        """
        done: int | None = None
        is_inline = self.read_policy.is_inline
        if is_inline:
            # Do not look again for what `try_read` has just missed.
            if offset != self._missed_offset:
                done = self._read_cached(offset, view)
                if done == len(view):
                    return done
                # `_read_cached` clears `is_inline` if the file system does not support RWF_NOWAIT.
                is_inline = self.read_policy.is_inline
            self._missed_offset = -1
        calls = host_calls()
        if calls.retries_reads:
            self.read_policy.uncached += 1
            if done is None and is_inline:
                return await self._read_retrying(calls, offset, view)
            return await self._read_rest(calls, offset, view, done or 0)
        if is_inline:
            self.read_policy.record_inline_miss()
            return await self._read_rest(calls, offset, view, done or 0)
        return await self._read_direct(calls, offset, view)

    def _read_cached(self, offset: int, view: memoryview) -> int | None:
        """Read from the page cache; return how many bytes at the start of the view were filled.

        Returns None if the first byte is not cached; the kernel then begins to fetch the data.
        Also returns None if the file system does not support RWF_NOWAIT.
        """
        try:
            done = os.preadv(self.fd, (view,), offset, self._flags)
        except OSError as error:
            if error.errno not in _NOT_CACHED:
                raise self._failed(error, "read") from error
            # The file system does not support RWF_NOWAIT.
            if error.errno == errno.EOPNOTSUPP:
                self.read_policy.disable_inline()
            return None
        if done == len(view):
            self.read_policy.misses = 0
        return done

    async def _read_rest(self, calls: HostCalls, offset: int, view: memoryview, done: int) -> int:
        """Fill ``view`` after ``done`` bytes, in a thread; return how many bytes are filled in all.

        The page cache lacks the rest, or the file ends; only a blocking read can distinguish these.
        """
        rest = view[done:] if done else view
        count, _ = await self._read_in_thread(calls, offset + done, rest)
        return done + count

    async def _read_direct(self, calls: HostCalls, offset: int, view: memoryview) -> int:
        """Read in a thread, without a look into the page cache; return how many bytes were read."""
        count, seconds = await self._read_in_thread(calls, offset, view)
        self.read_policy.record_direct_read(count, seconds)
        return count

    async def _read_retrying(self, calls: HostCalls, offset: int, view: memoryview) -> int:
        """Read data that was just missing in the page cache; return how many bytes were read."""
        done: int | None = None
        error: HostError | None = None

        def attempt() -> bool:
            nonlocal done, error
            try:
                done = self._read_cached(offset, view)
            except HostError as failed:
                error = failed
            return done is not None or error is not None

        async def in_thread() -> None:
            nonlocal done
            done = (await self._read_in_thread(calls, offset, view))[0]

        await self._retry.wait(attempt, in_thread)
        if error is not None:
            raise error
        if done is not None and done == len(view):
            return done
        return await self._read_rest(calls, offset, view, done or 0)

    async def _read_in_thread(
        self, calls: HostCalls, offset: int, view: memoryview
    ) -> tuple[int, float]:
        """Read in a thread; return the number of bytes and the seconds that the call took."""
        await acquire(self._call_slots)
        try:
            return await calls.read(self.fd, offset, view)
        except OSError as error:
            raise self._failed(error, "read") from error
        finally:
            self._call_slots.release()

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only where the file ends.  The call blocks,
        so only worker threads may call it, also concurrently.

        Raises:
            HostError: A system call failed.
        """
        try:
            return read_all(self.fd, offset, view)
        except OSError as error:
            raise self._failed(error, "read") from error

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from a file offset without blocking; return whether that succeeded.

        Returns False if the read would block or fail, if the file ends before the view is full, or
        if `ReadPolicy` permits no try.  The content of ``view`` is undefined then.
        """
        reads = self.read_policy
        if not reads.is_inline:
            return False
        try:
            if os.preadv(self.fd, (view,), offset, self._flags) == len(view):
                if reads.misses:
                    reads.misses = 0
                return True
        except BlockingIOError:
            self._missed_offset = offset
        except OSError:
            pass
        return False

    def try_start_read(
        self,
        offset: int,
        view: memoryview,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read in a native thread, which answers it; see `ReadableFile.try_start_read`.

        Also returns False if there are no native threads, if `_MAX_WAITING_CALLS` calls already
        wait, or if `ReadPolicy` demands a `try_read` first and the last such call has not missed at
        this offset.
        """
        calls = host_calls()
        reads, slots = self.read_policy, self._call_slots
        if not calls.can_start_reads or not slots.value:
            return False
        is_miss = reads.is_inline
        if is_miss:
            if offset != self._missed_offset:
                return False
            self._missed_offset = -1
            reads.record_inline_miss()
        slots.acquire_nowait()

        def finish(result: int, nanoseconds: int) -> None:
            slots.release()
            if result >= 0 and not is_miss:
                reads.record_direct_read(result, nanoseconds / 1e9)
            ended(result)

        try:
            calls.start_read(self.fd, offset, view, take_answer(), finish)
        except BaseException:
            slots.release()
            raise
        return True

    def stop_fetching(self) -> None:
        """Do nothing: no read of this file can be stopped."""

    def close_directory(self) -> None:
        """Close ``directory``, which only the opening of the files needs that this file names."""
        if self.directory is not None:
            self.directory.close()
            self.directory = None

    def close(self) -> None:
        """Close the file, which also releases its locks; a second call does nothing.

        Raises:
            HostError: The host reports an error, for example for a file on a server.  The file is
                closed nevertheless.
        """
        self.close_directory()
        if self.fd >= 0:
            # After an error, too, the number belongs to the next file that is opened.
            fd, self.fd = self.fd, -1
            try:
                os.close(fd)
            except OSError as error:
                raise self._failed(error, "close") from error

    def _failed(self, error: OSError, action: str) -> HostError:
        return HostError.from_os(error, self.name, action)
