"""Whether a call that changes a file would wait for the lock of the file's inode.

The kernel holds this lock (``i_rwsem``) during each call that changes a file.  When there are too
many dirty pages, the kernel makes a writing thread pause (it *throttles* the thread), and holds the
lock even during the pause.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
Args = TypeVarTuple("Args")

_MAX_CHANGING_THREADS: Final = 4
"""Maximum number of threads that change one file.  The kernel runs one change at a time, so more
threads would only wait for the lock instead of serving reads."""
_MAX_SLOW_WRITE_GAP_SECONDS: Final = 1.0
"""Throttling is assumed if a slow write begins within this time after the end of another one.  The
assumption ends with a fast write, or this time after the last slow write.  The kernel pauses a
throttled writer again and again, for at most 200 ms each time."""


async def acquire(semaphore: trio.Semaphore) -> None:
    """Decrement a semaphore; if no wait is needed, no other task runs before the return."""
    try:
        semaphore.acquire_nowait()
    except trio.WouldBlock:
        await semaphore.acquire()


class InodeLock:
    """Counts the reasons for which a call in the event loop might wait for one inode's lock.

    The event loop itself changes the file only while ``contention`` is 0.

    A short write in a thread counts as contention, so several writers could keep each other in
    threads permanently.  Therefore, if short writes are the only contention, another short write
    waits for their end (`wait_for_short_writes`) and can then run in the event loop.

    Attributes:
        contention: How many calls of `in_thread` have not ended, plus 1 while throttling is
            assumed, plus 1 if ``has_server`` was set.
        is_throttled: Whether the kernel is assumed to throttle short writes.
    """

    def __init__(self, *, has_server: bool = False) -> None:
        """Start without calls in threads.

        Args:
            has_server: Whether calls on the file wait for a server, which may stop answering at
                any time.
        """
        self.contention = int(has_server)
        self.is_throttled = False
        self._short_writes = 0  # how many of the calls in threads are short writes
        self._waiting = trio.lowlevel.ParkingLot()  # tasks in `wait_for_short_writes`
        self._slow_at = float("-inf")  # when the last slow write ended
        self._changing_threads = trio.Semaphore(_MAX_CHANGING_THREADS)

    def recheck_free(self) -> bool:
        """Return whether there is no contention now; end throttling if its time has passed."""
        if self.is_throttled and time.perf_counter() - self._slow_at > _MAX_SLOW_WRITE_GAP_SECONDS:
            self.end_throttling()
        return not self.contention

    async def wait_for_short_writes(self) -> None:
        """Wait until the short writes in threads have ended, or other contention begins.

        Returns immediately if there is other contention already.
        """
        if 0 < self.contention == self._short_writes:
            await self._waiting.park()

    async def in_thread(
        self,
        function: Callable[[*Args], Awaitable[T]],
        *args: *Args,
        is_short_write: bool = False,
    ) -> T:
        """Await ``function``, which makes a change of the file in a thread; return its result.

        ``is_short_write`` says whether `wait_for_short_writes` waits for this call.
        """
        self.contention += 1
        if is_short_write:
            self._short_writes += 1
        elif self._waiting:
            self._waiting.unpark_all()
        try:
            await acquire(self._changing_threads)
            try:
                return await function(*args)
            finally:
                self._changing_threads.release()
        finally:
            self.contention -= 1
            if is_short_write:
                self._short_writes -= 1
                if not self._short_writes and self._waiting:
                    self._waiting.unpark_all()

    def record_slow_write(self, seconds: float) -> None:
        """Record a short write that has just ended and was slow; ``seconds`` is its duration.

        A single slow write is not taken for throttling, because the thread may have waited for a
        processor.
        """
        now = time.perf_counter()
        follows = now - seconds - self._slow_at <= _MAX_SLOW_WRITE_GAP_SECONDS
        self._slow_at = now
        if follows and not self.is_throttled:
            self.is_throttled = True
            self.contention += 1
            self._waiting.unpark_all()

    def end_throttling(self) -> None:
        """Assume from now on that the kernel does not throttle short writes."""
        if self.is_throttled:
            self.is_throttled = False
            self.contention -= 1
