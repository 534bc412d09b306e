"""Whether a call that changes a file would wait for the lock of the file's inode.

The kernel takes this lock (``i_rwsem``) for the whole of a call that changes a file, also
while it throttles the calling thread because there are too many dirty pages.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
Args = TypeVarTuple("Args")

_MAX_THREADS: Final = 4
"""Worker threads that change one file concurrently.  The kernel lets one of them pass at a
time, and the remaining threads of the process are for reads."""
_THROTTLED_FOR_SECONDS: Final = 1.0
"""How long a slow write says anything about writes that begin later.  The kernel's longest
pause for a throttled writer is 200 ms."""


class InodeLock:
    """Counts the calls that may hold the lock of one file's inode.

    The event loop changes the file inline only while there are none.

    While there are holders, short writes go to a thread too.  Such a write counts as a
    holder, but does not send other short writes to a thread: a task that finds only short
    writes as holders waits for their end.  Otherwise several writers would keep each other
    in threads permanently.

    Attributes:
        holders: Calls in threads that hold the lock or wait for it, plus one while the
            kernel throttles short writes.
        is_throttled: Whether the kernel throttles short writes, as far as is known.
    """

    def __init__(self) -> None:
        """Start without holders."""
        self.holders = 0
        self.is_throttled = False
        self._short_writes = 0  # holders that are short writes
        self._waiting = trio.lowlevel.ParkingLot()  # tasks that wait for the end of those
        self._slow_at = float("-inf")
        self._threads = trio.Semaphore(_MAX_THREADS)

    def is_free(self) -> bool:
        """Return whether there are no holders; first ends the throttling if its time is over."""
        if self.is_throttled and time.perf_counter() - self._slow_at > _THROTTLED_FOR_SECONDS:
            self.end_throttling()
        return not self.holders

    async def wait_for_short_writes(self) -> None:
        """Wait while all holders are short writes; return when none is left or another comes."""
        if 0 < self.holders == self._short_writes:
            await self._waiting.park()

    async def in_thread(
        self, function: Callable[[*Args], T], *args: *Args, is_short_write: bool = False
    ) -> T:
        """Make a call that takes the lock in a worker thread; return its result."""
        self.holders += 1
        if is_short_write:
            self._short_writes += 1
        elif self._waiting:
            self._waiting.unpark_all()
        try:
            async with self._threads:
                return await trio.to_thread.run_sync(function, *args)
        finally:
            self.holders -= 1
            if is_short_write:
                self._short_writes -= 1
                if not self._short_writes and self._waiting:
                    self._waiting.unpark_all()

    def record_slow_write(self, seconds: float) -> None:
        """Record that a short write has just ended that may have been throttled.

        Two such writes within `_THROTTLED_FOR_SECONDS` count as throttling.  A single one
        may have waited for a processor instead.
        """
        now = time.perf_counter()
        follows = now - seconds - self._slow_at <= _THROTTLED_FOR_SECONDS
        self._slow_at = now
        if follows and not self.is_throttled:
            self.is_throttled = True
            self.holders += 1
            self._waiting.unpark_all()

    def end_throttling(self) -> None:
        """Record that the kernel does not throttle short writes now."""
        if self.is_throttled:
            self.is_throttled = False
            self.holders -= 1
