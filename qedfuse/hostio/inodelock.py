"""Whether the event loop could take the lock of a file's inode without waiting for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Args = TypeVarTuple("Args")

_MAX_THREADS: Final = 4
"""Worker threads that change one file concurrently: the kernel lets one at a time pass, and
the other threads are for reads."""
_THROTTLED_FOR_SECONDS: Final = 1.0
"""A slow write tells nothing about one that begins later than this: the kernel's longest
pause for a writer is 200 ms."""


class InodeLock:
    """Counts who may hold the lock that the kernel takes to change a file.

    The kernel holds it during the whole call, also while it throttles the thread that makes
    the call.  So the event loop changes the file inline only while there are no holders.

    A short write is made in a thread while there are.  It counts as a holder too, but sends no
    other short write to a thread: a task that finds only such holders waits for their end.
    Otherwise several writers would keep each other in threads for good.

    Attributes:
        holders: Calls in threads that hold the lock or wait for it, and one more while the
            kernel throttles short writes.
        is_throttled: Whether the kernel throttles short writes, as far as is known.
    """

    def __init__(self) -> None:
        """Begin without holders."""
        self.holders = 0
        self.is_throttled = False
        self._short = 0  # holders that are short writes
        self._waiting = trio.lowlevel.ParkingLot()  # for the end of those
        self._slow_at = float("-inf")
        self._threads = trio.Semaphore(_MAX_THREADS)

    def is_free(self) -> bool:
        """Tell whether there are no holders, after looking whether throttling is over."""
        if self.is_throttled and time.perf_counter() - self._slow_at > _THROTTLED_FOR_SECONDS:
            self.fast()
        return not self.holders

    async def wait_for_short(self) -> None:
        """Wait until no short write holds the lock, or somebody else does as well."""
        if 0 < self.holders == self._short:
            await self._waiting.park()

    async def in_thread(
        self, function: Callable[[*Args], T], *args: *Args, is_short: bool = False
    ) -> T:
        """Make a call that takes the lock in a worker thread; give what it returns."""
        self.holders += 1
        if is_short:
            self._short += 1
        elif self._waiting:
            self._waiting.unpark_all()
        try:
            async with self._threads:
                return await trio.to_thread.run_sync(function, *args)
        finally:
            self.holders -= 1
            if is_short:
                self._short -= 1
                if not self._short and self._waiting:
                    self._waiting.unpark_all()

    def slow(self, seconds: float) -> None:
        """Learn that a short write that just ended took so long that it may have been throttled.

        One alone may have waited for a processor.
        """
        now = time.perf_counter()
        follows = now - seconds - self._slow_at <= _THROTTLED_FOR_SECONDS
        self._slow_at = now
        if follows and not self.is_throttled:
            self.is_throttled = True
            self.holders += 1
            self._waiting.unpark_all()

    def fast(self) -> None:
        """Learn that writes are not throttled, or not any more."""
        if self.is_throttled:
            self.is_throttled = False
            self.holders -= 1
