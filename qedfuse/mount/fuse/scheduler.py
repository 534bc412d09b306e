"""How the loop that takes requests from the kernel waits for the next one.

pyfuse3 takes its scheduler from its attribute ``trio``, which its asyncio mode replaces;
`Scheduler` takes that place too.  It is trio with two things done otherwise, because a
request that is answered from memory costs less than going to sleep and waking up:

*The lock.*  pyfuse3 keeps several tasks, and a lock says which one reads from the kernel.
trio's lock hands itself over to the next waiter, so each request would cost a switch of
tasks.  `UnfairLock` stays with the task that has it for as long as that task answers at once.
When that task waits for something, another one takes over.

*Waiting for the descriptor.*  It is polled before anything is waited for.  If there is
nothing, other tasks have their turn; then, if that has paid lately, it is polled for some
more microseconds; only then is the loop put to sleep.

What keeps others from starving: after `BURST` requests in a row, or `BURST_BESIDE_OTHERS`
while somebody waits for the host's disk, all other tasks that can run have their
turn, and trio looks for threads that are done, timers and signals.  Nothing is polled for
while a thread is at work, whose end only trio sees, or while a read of the host's file is
polled for by another task.  Idle, the loop sleeps.
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

BURST: Final = 64
"""Requests that are taken one after the other before all other tasks have a turn."""

BURST_BESIDE_OTHERS: Final = 8
"""The same while requests wait for worker threads, or for the host's disk."""

POLL_SECONDS: Final = 100e-6
"""How long the descriptor is polled before the loop goes to sleep, if that pays."""


@dataclass(slots=True)
class SchedulerStatistics:
    """What the waiting for requests came to.

    Attributes:
        waiting: Requests that were there already.
        polled: Requests that came while the descriptor was polled.
        slept: How often the loop went to sleep instead.
        turns: How often other tasks were let in.
        vain: How often the descriptor was polled for nothing.
    """

    waiting: int = 0
    polled: int = 0
    slept: int = 0
    turns: int = 0
    vain: int = 0


class UnfairLock:
    """A lock whose holder keeps it as long as it does not wait for anything else.

    To acquire it while it is free is no checkpoint.  To release it wakes the task that
    waited last, whose memory is warm, but does not give it the lock: it gets it if it is
    still free when it runs.
    """

    def __init__(self) -> None:
        """Make a free one."""
        self._held = False
        self._waiting: list[trio.lowlevel.Task] = []
        self._woken = False

    async def __aenter__(self) -> None:
        """Wait until it is free, and hold it."""
        while self._held:
            await self._wait()
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        """Let it go."""
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            trio.lowlevel.reschedule(self._waiting.pop())

    async def _wait(self) -> None:
        """Sleep until the holder lets go."""
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        # Who was woken cannot be cancelled before it runs, so nobody's wake-up is lost.
        await trio.lowlevel.wait_task_rescheduled(abort)
        self._woken = False


class Scheduler:
    """Stands where pyfuse3 expects the module ``trio``, for one mount."""

    ClosedResourceError = trio.ClosedResourceError
    Lock = UnfairLock
    open_nursery = staticmethod(trio.open_nursery)
    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)

    def __init__(
        self,
        poll_seconds: float = POLL_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Poll for up to ``poll_seconds`` before going to sleep; ``clock`` tells seconds."""
        self.lowlevel = self
        self.statistics = SchedulerStatistics()
        self._adaptive_poll = AdaptivePoll(poll_seconds)
        self._clock = clock
        self._poller = select.poll()
        self._fd = -1
        self._closing = False
        self._burst = 0

    async def wait_readable(self, fd: int) -> None:
        """Return when there is a request to read; called by one task at a time.

        Raises:
            trio.ClosedResourceError: The mount is to end.
        """
        if fd != self._fd:
            self._fd = fd
            self._poller.register(fd, select.POLLIN)
        statistics = self.statistics
        if self._poller.poll(0):
            statistics.waiting += 1
            self._burst += 1
            if self._burst >= (BURST_BESIDE_OTHERS if self._others_at_work() else BURST):
                await self._turn()
            return
        since = self._clock()
        await self._turn()
        if self._adaptive_poll.seconds and self._poll(since + self._adaptive_poll.seconds):
            statistics.polled += 1
            self._adaptive_poll.record(0.0, slept=False)
            return
        if self._closing:
            raise trio.ClosedResourceError
        statistics.slept += 1
        alone = not self._others_at_work()
        await trio.lowlevel.wait_readable(fd)
        if alone:
            self._adaptive_poll.record(self._clock() - since, slept=True)

    def _poll(self, end: float) -> bool:
        """Poll until something is there (true), the time has come, or something else is up."""
        poll, clock = self._poller.poll, self._clock
        while not (self._others_at_work() or self._closing):
            if poll(0):
                return True
            if clock() >= end:
                self.statistics.vain += 1
                break
        return False

    def _others_at_work(self) -> bool:
        """Tell whether a request waits for something that only the loop sees."""
        return loop_load.polled_reads > 0 or loop_load.has_threads()

    async def _turn(self) -> None:
        """Let all other tasks run that can."""
        self._burst = 0
        self.statistics.turns += 1
        await trio.lowlevel.checkpoint()

    def has_request(self) -> bool:
        """Return whether the kernel has a request that no task has taken yet."""
        return self._fd >= 0 and bool(self._poller.poll(0))

    def notify_closing(self, fd: int) -> None:
        """End `wait_readable`, the one that is under way and all that follow."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


def default_poll_seconds() -> float:
    """Tell how long to poll on this machine; on a single processor it would delay the caller."""
    return POLL_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0


@contextmanager
def scheduled(poll_seconds: float | None) -> Iterator[Scheduler]:
    """Have pyfuse3 run on a scheduler of ours; None polls for what suits the machine.

    It must be there whenever `pyfuse3.main` runs: pyfuse3 keeps the lock that it was given
    first.
    """
    scheduler = Scheduler(default_poll_seconds() if poll_seconds is None else poll_seconds)
    # The documented way in which pyfuse3's own asyncio mode puts itself in trio's place.
    # Its type hints do not know of that.
    before, pyfuse3.trio = pyfuse3.trio, scheduler  # type: ignore[attr-defined]
    try:
        with loop_load.request_source(scheduler.has_request):
            yield scheduler
    finally:
        pyfuse3.trio = before  # type: ignore[attr-defined]
        _log.debug("%s", scheduler.statistics)
