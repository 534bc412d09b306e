"""How pyfuse3's tasks wait for the next request of the kernel.

pyfuse3 uses trio only through its module attribute ``trio``.  pyfuse3's asyncio mode replaces
this attribute, and this module does the same, with a `Scheduler`.  A `Scheduler` avoids switches of
tasks and sleeps of the event loop, which cost more than answering a request from memory.

The descriptor of the connection to the kernel is polled once.  If the kernel has no request, all
other tasks run.  Then the descriptor is polled for some more microseconds, if recent waits were
short (`AdaptivePoll`).  If the kernel still has no request, the event loop sleeps.

After a request the C extension itself polls for the next one (`_burst.c`), because a program with
one request in flight sends the next one before the event loop calls the scheduler again.

Reads that io_uring makes (`_queuedread.c`) are answered between two requests and while the
descriptor is polled.  The next request usually follows soon after such an answer.  So while
io_uring holds reads, the descriptor is polled before the other tasks run.
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

from qedfuse.hostio.hostcalls import host_calls
from qedfuse.mount.fuse.extraops import (
    end_queued_reads,
    forbid_polling,
    permit_polling,
    queued_reads,
    take_burst_count,
    take_polled_seconds,
)
from qedfuse.mount.fuse.unfairlock import UnfairLock
from qedfuse.util.adaptivepoll import AdaptivePoll
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.hostio.hostcalls import HostCalls

_log = logging.getLogger(__name__)

MAX_BURST: Final = 64
"""Number of requests in a row after which all other tasks run.

The extension takes several requests at a time, at most 63, so the number can be exceeded by that
many."""

MAX_BURST_BESIDE_OTHERS: Final = 8
"""The same as `MAX_BURST`, while the event loop is needed for other work."""

MAX_BURST_BESIDE_READS: Final = 16
"""While io_uring holds reads, the descriptor is polled before the other tasks run, but only until
this number of requests was taken in a row."""

EXTENSION_POLL_SECONDS: Final = 5e-3
"""For how long after a run of the other tasks the extension may poll."""

DEFAULT_POLL_SECONDS: Final = 100e-6
"""Maximum time for which the descriptor is polled before the event loop sleeps."""


@dataclass(slots=True)
class SchedulerStatistics:
    """Counts how the tasks waited for requests, for the debug log.

    The requests that the extension took are counted later, with a request that had arrived before a
    task waited for it.

    Attributes:
        ready: Requests that had arrived before a task waited for them.
        polled: Requests that arrived while the descriptor was polled.
        slept: How often the event loop slept to wait for a request.
        yields: How often the other runnable tasks were allowed to run.
        failed_polls: How often the descriptor was polled for the full time without a request.
    """

    ready: int = 0
    polled: int = 0
    slept: int = 0
    yields: int = 0
    failed_polls: int = 0


class Scheduler:
    """Replaces the module ``trio`` in pyfuse3, for one mount.

    Attributes:
        lowlevel: The scheduler itself, which also replaces ``trio.lowlevel``.
        statistics: How the tasks have waited for requests so far.
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
        calls: HostCalls | None = None,
    ) -> None:
        """Make a scheduler for the event loop that runs now.

        Args:
            poll_seconds: Maximum time to poll before the event loop sleeps; 0 to poll only once.
            clock: Returns the time in seconds.
            calls: Makes calls on host files; None for the object of the current event loop.
        """
        self.lowlevel = self
        self.statistics = SchedulerStatistics()
        self._load = loop_load()
        self._adaptive_poll = AdaptivePoll(poll_seconds)
        self._clock = clock
        self._calls = host_calls() if calls is None else calls
        self._poller = select.poll()
        self._fd = -1
        self._closing = False
        self._burst = 0  # requests that were counted since the other tasks ran last

    async def wait_readable(self, fd: int) -> None:
        """Wait until the kernel has a request on ``fd``.

        The caller must hold pyfuse3's lock, so that only one task waits.

        Raises:
            trio.ClosedResourceError: The kernel has no request, and `notify_closing` was called.
        """
        if fd != self._fd:
            self._fd = fd
            self._poller.register(fd, select.POLLIN)
        if self._poller.poll(0):
            await self._take_ready()
            return
        statistics = self.statistics
        # The wait began when the extension began to poll for this request.
        since = self._clock() - take_polled_seconds()
        if self._poll_beside_reads(since):
            statistics.polled += self._count_taken()
            self._adaptive_poll.record(0.0, slept=False)  # 0: polling has found the request
            return
        await self._run_other_tasks()
        if self._adaptive_poll.seconds:
            end = since + self._adaptive_poll.seconds
            # `_poll` returns early if a task waits for a call that has ended.  The task runs, and
            # polling goes on.
            while not (found := self._poll(end)) and self._calls.resuming:
                await self._run_other_tasks()
            if found:
                self._permit_polling()
                statistics.polled += 1
                self._adaptive_poll.record(0.0, slept=False)  # 0: polling has found the request
                return
        if self._closing:
            raise trio.ClosedResourceError
        await self._sleep(fd, since)

    async def _take_ready(self) -> None:
        """Count the request that the kernel has; let other tasks run if it is their turn."""
        self.statistics.ready += self._count_taken()
        if self._calls.has_finished():
            # The tasks that wait for these calls become runnable.  `_is_loop_needed` returns True
            # until they have run, so they run after `MAX_BURST_BESIDE_OTHERS` requests at the
            # latest.
            self._calls.deliver()
        end_queued_reads()
        is_loop_needed = self._is_loop_needed()
        if is_loop_needed:
            forbid_polling()
        if self._burst >= (MAX_BURST_BESIDE_OTHERS if is_loop_needed else MAX_BURST):
            await self._run_other_tasks()
            self._permit_polling()

    async def _sleep(self, fd: int, since: float) -> None:
        """Let the event loop sleep until a request arrives; ``since`` is when the wait began."""
        self.statistics.slept += 1
        # If the event loop is needed for other work, it may run this task long after a request
        # has arrived.  So such a wait says nothing about the requests.
        is_loop_free = not self._is_loop_needed()
        await trio.lowlevel.wait_readable(fd)
        if is_loop_free:
            self._adaptive_poll.record(self._clock() - since, slept=True)
        self._permit_polling()

    def _permit_polling(self) -> None:
        """Let the extension poll, if polling pays off and the event loop is not needed.

        The caller must have let all other tasks run since the last request.
        """
        if self._adaptive_poll.seconds and not self._is_loop_needed():
            permit_polling(
                self._adaptive_poll.seconds, EXTENSION_POLL_SECONDS, self._calls.has_finished
            )
        else:
            forbid_polling()

    def _poll_beside_reads(self, since: float) -> bool:
        """Poll before other tasks run, if io_uring holds reads; return whether a request came."""
        seconds = self._adaptive_poll.seconds
        if not seconds or self._burst >= MAX_BURST_BESIDE_READS or not queued_reads():
            return False
        return self._poll(since + seconds)

    def _count_taken(self) -> int:
        """Count the next request and those that the extension has taken; return their number."""
        taken = 1 + take_burst_count()
        self._burst += taken
        return taken

    def _poll(self, end: float) -> bool:
        """Poll without letting other tasks run; return whether a request has arrived.

        Polling stops at the time ``end``, when the mount ends, and when the event loop is needed.
        """
        poll, clock, has_finished = self._poller.poll, self._clock, self._calls.has_finished
        while not (self._is_loop_needed() or self._closing):
            if has_finished():
                # If a task waits for one of these calls, it becomes runnable, and polling ends.
                # No task waits for a read of `HostCalls.start_read`, which a thread answers, so
                # after such a call polling goes on.
                self._calls.deliver()
                continue
            end_queued_reads()
            if poll(0):
                return True
            if clock() >= end:
                self.statistics.failed_polls += 1
                break
        return False

    def _is_loop_needed(self) -> bool:
        """Return whether the event loop is needed for other work, which polling would delay.

        Polling delays threads of trio and threads that ask a server, because only the event loop
        notices their end.  The end of a native thread's call is noticed while polling, too
        (`HostCalls.has_finished`).
        """
        return (
            self._load.polled_reads > 0
            or self._calls.resuming > 0
            or self._load.has_running_threads()
        )

    async def _run_other_tasks(self) -> None:
        """Let all other runnable tasks run, also those whose calls have finished."""
        self._burst = 0
        self.statistics.yields += 1
        end_queued_reads()
        if self._calls.has_finished():
            self._calls.deliver()
        await trio.lowlevel.checkpoint()
        # trio may run this task before others that became runnable at the same time.  So the
        # checkpoint is repeated until all tasks whose calls have finished have run.
        while self._calls.resuming:
            await trio.lowlevel.checkpoint()

    def has_request(self) -> bool:
        """Return whether the kernel has a request that no task has taken yet.

        The caller is about to keep the event loop busy.  So `end_queued_reads` is called first,
        which submits reads and answers those that have ended.

        The result is False before the first call of `wait_readable` and after `notify_closing`.
        """
        end_queued_reads()
        return self._fd >= 0 and not self._closing and bool(self._poller.poll(0))

    def notify_closing(self, fd: int) -> None:
        """End the call of `wait_readable` for ``fd``; later calls raise in place of waiting."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


def default_poll_seconds() -> float:
    """Return the maximum time to poll on this machine, in seconds.

    The result is 0 if the process may run on one processor only, because polling would delay the
    program that makes requests.
    """
    return DEFAULT_POLL_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0


@contextmanager
def scheduled(poll_seconds: float | None) -> Iterator[Scheduler]:
    """Make pyfuse3 use a `Scheduler` in the block, and yield the scheduler.

    All calls of `pyfuse3.main` must be in one block, because pyfuse3 keeps the lock that it makes
    in the first call.

    Args:
        poll_seconds: Maximum time in seconds to poll for a request; 0 to poll only once; None
            for `default_poll_seconds`.
    """
    scheduler = Scheduler(default_poll_seconds() if poll_seconds is None else poll_seconds)
    # pyfuse3 documents this attribute for its asyncio mode; its type hints lack it.
    before, pyfuse3.trio = pyfuse3.trio, scheduler  # type: ignore[attr-defined]
    try:
        with loop_load().request_source(scheduler.has_request):
            yield scheduler
    finally:
        pyfuse3.trio = before  # type: ignore[attr-defined]
        _log.debug("%s", scheduler.statistics)
