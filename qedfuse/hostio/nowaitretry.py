"""Retrying reads that the host's page cache cannot answer yet, but soon will.

When a read with ``RWF_NOWAIT`` finds nothing in the page cache, the kernel starts to fetch the
pages, and the read fails with EAGAIN (preadv2(2)).  On a fast disk the pages arrive after about 100
microseconds, as long as a round trip to a worker thread takes.  So the read is retried in each pass
of the event loop.  It goes to a worker thread if its retries do not succeed in time, if retries
have failed lately, or if a worker thread is running.

Only the task of the oldest read retries, and the tasks of later reads sleep.  A read that a thread
of the extension can make is not retried, because such threads cost less than those of trio.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.util.adaptivepoll import AdaptivePoll
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.util.loopload import LoopLoad

MAX_RETRY_SECONDS: Final = 1e-3
"""Maximum time for which a read is retried before the read goes to a worker thread."""


class _Read:
    """A read that is being retried.

    Attributes:
        attempt: Tries the read; returns whether the read has ended, with data or an error.
        deadline: When to give up, in seconds of the clock that `_RetryQueue.retry` gets.
        task: The task of this read while the task sleeps; otherwise None.  The task sleeps until
            ``has_ended`` is set, or until this read is the first of the queue.
        has_ended: True if the read has ended, with data or an error; False if the retries were
            given up; None before.
    """

    __slots__ = ("attempt", "deadline", "has_ended", "task")

    def __init__(self, attempt: Callable[[], bool], deadline: float) -> None:
        self.attempt = attempt
        self.deadline = deadline
        self.task: trio.lowlevel.Task | None = None
        self.has_ended: bool | None = None

    def wake(self) -> None:
        """Wake the task of this read if it sleeps."""
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)


class _RetryQueue:
    """The reads that are being retried in one event loop, of any file, the oldest first.

    When the first read is done or given up, the task of the next one takes over.  Each event loop
    has its own queue (`_retry_queue`), because a task can wake only tasks of its event loop.

    Attributes:
        load: The load of the event loop.
    """

    def __init__(self, load: LoopLoad) -> None:
        """Start empty; the reads are counted in ``load``."""
        self.load = load
        self._reads: deque[_Read] = deque()

    async def retry(
        self, attempt: Callable[[], bool], deadline: float, clock: Callable[[], float]
    ) -> bool:
        """Retry ``attempt`` until it returns True; return False if the retries are given up.

        Gives up when ``deadline`` has passed, or `LoopLoad.has_running_threads` returns True: an
        event loop that never sleeps starves other threads of the GIL.  ``clock`` returns the
        present time.
        """
        read = _Read(attempt, deadline)
        self._reads.append(read)
        self.load.polled_reads += 1
        try:
            if self._reads[0] is not read:
                read.task = trio.lowlevel.current_task()
                # This wait cannot be cancelled, but ends after about `MAX_RETRY_SECONDS`.
                await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
            while read.has_ended is None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._attempt_oldest(clock)
        finally:
            self.load.polled_reads -= 1
            if read.has_ended is None:
                self._reads.remove(read)
            if self._reads:
                self._reads[0].wake()
        return read.has_ended

    def _attempt_oldest(self, clock: Callable[[], float]) -> None:
        """Try the reads in order until one must wait longer; remove and wake those before it."""
        reads = self._reads
        while reads:
            has_ended = reads[0].attempt()
            if (
                not has_ended
                and clock() < reads[0].deadline
                and not self.load.has_running_threads()
            ):
                break
            read = reads.popleft()
            read.has_ended = has_ended
            read.wake()


_queue: Final = trio.lowlevel.RunVar[_RetryQueue]("queue")


def _retry_queue() -> _RetryQueue:
    """Return the queue of the event loop that runs in this thread."""
    try:
        return _queue.get()
    except LookupError:
        queue = _RetryQueue(loop_load())
        _queue.set(queue)
        return queue


class NowaitRetry:
    """Retries reads of one file while the kernel fetches their data into the page cache."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with retries enabled; ``clock`` returns seconds."""
        self._poll = AdaptivePoll(MAX_RETRY_SECONDS, start_enabled=True)
        self._clock = clock

    async def wait(
        self, attempt: Callable[[], bool], read_in_thread: Callable[[], Awaitable[None]]
    ) -> None:
        """Retry ``attempt``; if it does not return True in time, read in a worker thread.

        Args:
            attempt: Tries the read; returns whether the read has ended.  Must not raise.
            read_in_thread: Reads in a worker thread.  Called if the read is not retried, or if its
                retries take too long.
        """
        since = self._clock()
        queue = _retry_queue()
        seconds = 0.0 if queue.load.has_running_threads() else self._poll.seconds
        if seconds and await queue.retry(attempt, since + seconds, self._clock):
            # `AdaptivePoll.record` expects 0 seconds if polling has found the event.
            self._poll.record(0.0, slept=False)
            return
        await read_in_thread()
        self._poll.record(self._clock() - since, slept=True)
