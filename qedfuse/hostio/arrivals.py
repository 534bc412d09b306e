"""Reads that the host's page cache cannot answer yet, but is going to in a moment.

A read with ``RWF_NOWAIT`` that finds nothing has the kernel begin to fetch the pages before
it says so.  On a fast disk they are there after some 100 microseconds, which is what the way
to a worker thread and back costs.  So where that has paid lately the read is tried again
each time when all other tasks had their turn, and goes to a thread only after that.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.util.window import Window

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LONGEST: Final = 1e-3
"""For how long a read is tried again, in seconds."""


class Loop:
    """What the waits of one process have to know of each other.

    Attributes:
        polled_reads: How many reads are being tried again and again now.  While there are
            any, nobody should keep the loop for himself.
        is_wanted: Tells whether somebody waits for the loop to take his request.
    """

    def __init__(self) -> None:
        """Begin with nobody waiting."""
        self.polled_reads = 0
        self.is_wanted: Callable[[], bool] = lambda: False
        self._threads = trio.lowlevel.RunVar[trio.CapacityLimiter]("threads")

    def has_threads(self) -> bool:
        """Tell whether a worker thread is at work.

        Then the loop must go to sleep: only trio sees the thread's end, and it needs
        Python's lock, which a loop that never sleeps hardly ever leaves to it.
        """
        try:
            threads = self._threads.get()
        except LookupError:
            threads = trio.to_thread.current_default_thread_limiter()
            self._threads.set(threads)
        return threads.borrowed_tokens > 0


loop: Final = Loop()


class Arrivals:
    """Waits for what the host's disk brings to one file."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin without knowing how fast the disk is; ``clock`` tells seconds."""
        self._window = Window(LONGEST, hopeful=True)
        self._clock = clock

    async def wait(self, ready: Callable[[], bool], sleep: Callable[[], Awaitable[None]]) -> None:
        """Return when ``ready`` says so, or else when ``sleep`` has done it in its own way."""
        since = self._clock()
        if await self._poll(ready, since + self._window.seconds):
            self._window.came(0.0, slept=False)
            return
        await sleep()
        self._window.came(self._clock() - since, slept=True)

    async def _poll(self, ready: Callable[[], bool], end: float) -> bool:
        """Ask ``ready`` each time when all others have had their turn."""
        loop.polled_reads += 1
        try:
            while self._clock() < end and not loop.has_threads():
                await trio.lowlevel.cancel_shielded_checkpoint()
                if ready():
                    return True
        finally:
            loop.polled_reads -= 1
        return False
