"""How pyfuse3's tasks wait for the next request of the kernel.

pyfuse3 calls its scheduler through its attribute ``trio``, which its asyncio mode replaces;
`Scheduler` replaces it in the same way.  It is trio with two differences, because a request
that is answered from memory costs less than putting the event loop to sleep and waking it.

*The lock.*  pyfuse3 has several tasks, and a lock decides which of them reads from the kernel.
trio's lock is fair: it is handed over to the next waiter, so each request would cost a switch
of tasks.  `UnfairLock` allows barging: the task that releases it can take it again before the
waiters, as long as it answers requests without waiting.  When that task waits for something
else, another one takes the lock.

*Waiting for the descriptor.*  The descriptor is polled before anything else.  If there is no
request, all other tasks run.  Then the descriptor is polled for some more microseconds, if such
polling has succeeded lately (`AdaptivePoll`).  Only then does the event loop sleep.

Other tasks are not starved: after `MAX_BURST` requests in a row, or `MAX_BURST_BESIDE_OTHERS`
while a request waits for the host's disk, all other runnable tasks run, and trio checks for
finished threads, timers and signals.  The descriptor is not polled repeatedly while a worker
thread is running, whose end only trio notices, or while another task polls for a read of the
host's file.  An idle event loop sleeps.
"""

from __future__ import annotations

import logging
import os
import select
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.util.adaptivepoll import AdaptivePoll
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger(__name__)

MAX_BURST: Final = 64
"""Requests that are taken in a row before all other tasks run."""

MAX_BURST_BESIDE_OTHERS: Final = 8
"""The same while other requests wait for worker threads or for the host's disk."""

DEFAULT_POLL_SECONDS: Final = 100e-6
"""How long the descriptor is polled before the event loop sleeps."""


@dataclass(slots=True)
class SchedulerStatistics:
    """Counts how the tasks waited for requests, for the debug log.

    Attributes:
        ready: Requests that had arrived before a task waited for them.
        polled: Requests that arrived while the descriptor was polled.
        slept: How often the event loop slept instead.
        yields: How often all other tasks were run.
        failed_polls: How often no request arrived while the descriptor was polled.
    """

    ready: int = 0
    polled: int = 0
    slept: int = 0
    yields: int = 0
    failed_polls: int = 0


class UnfairLock:
    """A lock that a task can acquire before those that have waited for it ("barging").

    Acquiring a free lock is no checkpoint.  Releasing the lock wakes the task that began to
    wait last, whose memory is still in the processor's caches, but does not hand the lock over
    to it: that task gets the lock only if it is still free when the task runs.
    """

    def __init__(self) -> None:
        """Make a lock that is free."""
        self._held = False
        self._waiting: list[trio.lowlevel.Task] = []
        self._woken = False

    async def __aenter__(self) -> None:
        """Acquire the lock; wait while another task holds it."""
        while self._held:
            await self._wait()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        """Release the lock and wake one waiter, if none has been woken already."""
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            trio.lowlevel.reschedule(self._waiting.pop())

    async def _wait(self) -> None:
        """Sleep until the lock has been released."""
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        # A task that was rescheduled cannot be cancelled before it runs, so no wake-up is lost.
        await trio.lowlevel.wait_task_rescheduled(abort)
        self._woken = False


class Scheduler:
    """Replaces the module ``trio`` in pyfuse3, for one mount.

    Attributes:
        lowlevel: The scheduler itself, which also replaces ``trio.lowlevel``.
        statistics: How the tasks waited for requests.
    """

    ClosedResourceError = trio.ClosedResourceError
    Lock = UnfairLock
    open_nursery = staticmethod(trio.open_nursery)
    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)

    def __init__(
        self,
        poll_seconds: float = DEFAULT_POLL_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Poll for up to ``poll_seconds`` before sleeping; ``clock`` returns seconds."""
        self.lowlevel = self
        self.statistics = SchedulerStatistics()
        self._adaptive_poll = AdaptivePoll(poll_seconds)
        self._clock = clock
        self._poller = select.poll()
        self._fd = -1
        self._closing = False
        self._burst = 0

    async def wait_readable(self, fd: int) -> None:
        """Wait until the kernel has a request on ``fd``; called by one task at a time.

        Raises:
            trio.ClosedResourceError: `notify_closing` was called, because the mount ends.
        """
        if fd != self._fd:
            self._fd = fd
            self._poller.register(fd, select.POLLIN)
        statistics = self.statistics
        if self._poller.poll(0):
            statistics.ready += 1
            self._burst += 1
            if self._burst >= (MAX_BURST_BESIDE_OTHERS if self._is_loop_needed() else MAX_BURST):
                await self._run_other_tasks()
            return
        since = self._clock()
        await self._run_other_tasks()
        if self._adaptive_poll.seconds and self._poll(since + self._adaptive_poll.seconds):
            statistics.polled += 1
            self._adaptive_poll.record(0.0, slept=False)
            return
        if self._closing:
            raise trio.ClosedResourceError
        statistics.slept += 1
        # A wake-up may be late because of other work, and then says nothing about requests.
        alone = not self._is_loop_needed()
        await trio.lowlevel.wait_readable(fd)
        if alone:
            self._adaptive_poll.record(self._clock() - since, slept=True)

    def _poll(self, end: float) -> bool:
        """Poll until a request arrives; return False at time ``end`` or if the loop is needed."""
        poll, clock = self._poller.poll, self._clock
        while not (self._is_loop_needed() or self._closing):
            if poll(0):
                return True
            if clock() >= end:
                self.statistics.failed_polls += 1
                break
        return False

    def _is_loop_needed(self) -> bool:
        """Return whether another request waits for something that only the event loop notices."""
        return loop_load.polled_reads > 0 or loop_load.has_threads()

    async def _run_other_tasks(self) -> None:
        """Let all other runnable tasks run once."""
        self._burst = 0
        self.statistics.yields += 1
        await trio.lowlevel.checkpoint()

    def has_request(self) -> bool:
        """Return whether the kernel has a request that no task has taken yet."""
        return self._fd >= 0 and bool(self._poller.poll(0))

    def notify_closing(self, fd: int) -> None:
        """Make the current call of `wait_readable`, and all later ones, raise."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


def default_poll_seconds() -> float:
    """Return how long to poll; 0 on a single processor, where it would delay the next request."""
    return DEFAULT_POLL_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0


@contextmanager
def scheduled(poll_seconds: float | None) -> Iterator[Scheduler]:
    """Run pyfuse3 with a `Scheduler` in the block.

    Every call of `pyfuse3.main` must be in the same block, because pyfuse3 keeps the lock that
    it has made first.

    Args:
        poll_seconds: Longest time to poll for a request; None for the machine's default.
    """
    scheduler = Scheduler(default_poll_seconds() if poll_seconds is None else poll_seconds)
    # pyfuse3's own asyncio mode replaces trio in this documented way, which is missing from
    # its type hints.
    before, pyfuse3.trio = pyfuse3.trio, scheduler  # type: ignore[attr-defined]
    try:
        with loop_load.request_source(scheduler.has_request):
            yield scheduler
    finally:
        pyfuse3.trio = before  # type: ignore[attr-defined]
        _log.debug("%s", scheduler.statistics)
