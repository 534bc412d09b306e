"""Reads that the host's page cache cannot answer yet, but is going to in a moment.

A read with ``RWF_NOWAIT`` that finds nothing has the kernel begin to fetch the pages before
it says so.  On a fast disk they are there after some 100 microseconds, which is what the way
to a worker thread and back costs.  So where that has paid lately the read is tried again
each time when all other tasks had their turn, and goes to a thread only after that.

One task at a time tries, the one whose read began first; while that is not there yet, those
behind it are not asked for.  The other tasks sleep.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.util.adaptivepoll import AdaptivePoll

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


class _Read:
    """A read that is tried again.

    Attributes:
        ready: Tries it.
        end: When to give up.
        task: Who sleeps until ``came`` is known, or until it is his turn to try.
        came: Whether it came in time, once that is known.
    """

    __slots__ = ("came", "end", "ready", "task")

    def __init__(self, ready: Callable[[], bool], end: float) -> None:
        self.ready = ready
        self.end = end
        self.task: trio.lowlevel.Task | None = None
        self.came: bool | None = None

    def wake(self) -> None:
        """Wake who sleeps, once."""
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)


class Queue:
    """The reads of all files that are being tried again, the oldest first.

    The task of the first one tries; when that read is decided, the next task takes over.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._reads: deque[_Read] = deque()

    async def came(self, ready: Callable[[], bool], end: float, clock: Callable[[], float]) -> bool:
        """Return when ``ready`` says so (true), or when ``end`` has come."""
        read = _Read(ready, end)
        self._reads.append(read)
        loop.polled_reads += 1
        try:
            if self._reads[0] is not read:
                read.task = trio.lowlevel.current_task()
                # It is a matter of a millisecond, so nothing is cancelled.
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
            while read.came is None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._try(clock)
        finally:
            loop.polled_reads -= 1
            if read.came is None:
                self._reads.remove(read)
            if self._reads:
                self._reads[0].wake()
        return read.came

    def _try(self, clock: Callable[[], float]) -> None:
        """Try the oldest reads, up to the first that has to be waited for."""
        reads = self._reads
        while reads:
            came = reads[0].ready()
            if not came and clock() < reads[0].end and not loop.has_threads():
                break
            read = reads.popleft()
            read.came = came
            read.wake()


_queue: Final = Queue()


class NowaitRetry:
    """Waits for what the host's disk brings to one file."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begin without knowing how fast the disk is; ``clock`` tells seconds."""
        self._window = AdaptivePoll(LONGEST, start_enabled=True)
        self._clock = clock

    async def wait(self, ready: Callable[[], bool], sleep: Callable[[], Awaitable[None]]) -> None:
        """Return when ``ready`` says so, or else when ``sleep`` has done it in its own way.

        ``ready`` must not raise anything.
        """
        since = self._clock()
        seconds = 0.0 if loop.has_threads() else self._window.seconds
        if seconds and await _queue.came(ready, since + seconds, self._clock):
            self._window.came(0.0, slept=False)
            return
        await sleep()
        self._window.came(self._clock() - since, slept=True)
