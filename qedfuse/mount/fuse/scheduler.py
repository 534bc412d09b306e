"""How pyfuse3's tasks wait for the next request of the kernel.

pyfuse3 uses trio only through its module attribute ``trio``.  pyfuse3's asyncio mode replaces
this attribute, and this module does the same, with a `Scheduler`.  A `Scheduler` behaves like
trio, with two differences.  The differences avoid switches of tasks and sleeps of the event loop.
Putting the event loop to sleep and waking it costs more than answering a request from memory.

*The lock.*  pyfuse3 has several tasks, and a lock decides which of them reads from the kernel.
This lock is an `UnfairLock`.

*Waiting for the descriptor.*  First the descriptor of the connection to the kernel is polled once.
If the kernel has no request, all other tasks run.  After that, the descriptor is polled for some
more microseconds, if the last waits were so short that such polling would have found the request
(`AdaptivePoll`).  If the kernel still has no request, the event loop sleeps, so an idle server uses
no processor time.

After a request the C extension itself polls for the next one (`_burst.c`), because a program with
one request in flight sends the next request before the event loop calls the scheduler again.  The
scheduler permits this polling only while polling pays off, and only after all other tasks have run.
Polling is permitted for `EXTENSION_POLL_SECONDS`; after this time the other tasks run again.

Other tasks are not starved.  After `MAX_BURST` requests in a row, all other runnable tasks run,
and trio checks for finished threads, timers and signals.  While the event loop is needed for
other work, the other tasks run after only `MAX_BURST_BESIDE_OTHERS` requests in a row, and the
descriptor is polled only once.  The event loop is needed in three cases:

- A thread of trio is running, or a thread that fetches the bytes of a read from a server.  Only
  trio notices the end of such a thread.
- Another task retries a read of a host file (`qedfuse.hostio.nowaitretry`).
- A task is runnable because its call on a host file has ended.

A native thread that makes a call on a host file (`HostCalls`) does not need the event loop, so the
descriptor is polled as usual during the call.  The scheduler itself notices the end of the call, at
each `wait_readable` and while it polls (`HostCalls.has_finished`).  After the end of the call, the
task that waits for the native thread runs when the kernel has no further request, and at the latest
after about `MAX_BURST_BESIDE_OTHERS` requests.

Reads in the queue of the kernel (`_queuedread.c`) are answered between two requests and while the
descriptor is polled.  The next request usually follows soon after the answer to a queued read.  So
while the queue holds reads, the descriptor is polled before the other tasks run, unless
`MAX_BURST_BESIDE_READS` requests in a row have been taken.
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

The extension reads a few requests at a time (`take_burst_count`), so the number can be exceeded by
a few."""

MAX_BURST_BESIDE_OTHERS: Final = 8
"""Number of requests in a row after which all other tasks run, while the event loop is needed for
other work."""

MAX_BURST_BESIDE_READS: Final = 16
"""While reads are in the queue of the kernel, the descriptor is polled before other tasks run, but
only until this number of requests in a row has been taken.  After that, all other tasks run as soon
as the kernel has no request."""

EXTENSION_POLL_SECONDS: Final = 5e-3
"""For how long after a run of the other tasks the extension may poll.  A run of the other tasks
takes about 100 µs, a write of 1 MiB about 400 µs."""

DEFAULT_POLL_SECONDS: Final = 100e-6
"""Maximum time for which the descriptor is polled before the event loop sleeps."""


@dataclass(slots=True)
class SchedulerStatistics:
    """Counts how the tasks waited for requests, for the debug log.

    Attributes:
        ready: Requests that had arrived before a task waited for them.  Requests that the extension
            has taken are counted later, here or in ``polled``.
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
            calls: Makes calls on host files; the scheduler asks it whether calls have ended.  None
                for the object of the current event loop (`host_calls`).
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
        self._burst = 0  # requests that were taken since the other tasks ran last

    async def wait_readable(self, fd: int) -> None:
        """Wait until the kernel has a request on ``fd``.

        The caller must hold pyfuse3's lock (an `UnfairLock`), so that only one task waits.

        Raises:
            trio.ClosedResourceError: The kernel has no request, and `notify_closing` was called
                before or during the wait, because the mount ends.
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
            # If a call on a host file has ended and a task waits for the call, `_poll` returns
            # early.  That task runs, and polling goes on.
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
        """Count the request that the kernel has; let other tasks run after a number of requests."""
        self.statistics.ready += self._count_taken()
        if self._calls.has_finished():
            # The tasks that wait for the finished calls become runnable.  They run when this task
            # waits, at the latest after `MAX_BURST_BESIDE_OTHERS` requests in a row, because
            # `_is_loop_needed` returns True until those tasks have run.
            self._calls.deliver()
        end_queued_reads()
        is_loop_needed = self._is_loop_needed()
        if is_loop_needed:
            forbid_polling()
        if self._burst >= (MAX_BURST_BESIDE_OTHERS if is_loop_needed else MAX_BURST):
            await self._run_other_tasks()
            self._permit_polling()

    async def _sleep(self, fd: int, since: float) -> None:
        """Let the event loop sleep until a request arrives.

        Args:
            fd: The descriptor of the connection.
            since: The time of the clock, in seconds, when the wait for the request began.
        """
        self.statistics.slept += 1
        # If the event loop is needed for other work, it may run this task long after a request
        # has arrived.  So the length of such a wait is not the time until a request arrives, and
        # is not recorded.
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
        """Poll before other tasks run, if reads are in the queue; return whether a request arrived.

        Returns False without polling if polling does not pay off, no read is in the queue, or
        `MAX_BURST_BESIDE_READS` is reached.

        Args:
            since: The time of the clock, in seconds, when the wait for the request began.
        """
        seconds = self._adaptive_poll.seconds
        if not seconds or self._burst >= MAX_BURST_BESIDE_READS or not queued_reads():
            return False
        return self._poll(since + seconds)

    def _count_taken(self) -> int:
        """Count the next request of pyfuse3 and those of the extension; return their number.

        The requests of the extension are those that it has taken since the last call.
        """
        taken = 1 + take_burst_count()
        self._burst += taken
        return taken

    def _poll(self, end: float) -> bool:
        """Poll until a request arrives, without letting other tasks run.

        Args:
            end: The time of the clock at which to give up, in seconds.

        Returns:
            True if a request has arrived.  False if the time is over, if the mount ends, or if the
            event loop is needed for other work.  Such work is, for example, a task whose call has
            finished.
        """
        poll, clock, has_finished = self._poller.poll, self._clock, self._calls.has_finished
        while not (self._is_loop_needed() or self._closing):
            if has_finished():
                # If a task waits for one of the finished calls, `deliver` makes the task runnable,
                # so the event loop is needed, and polling ends.  Otherwise polling goes on: no task
                # waits for a read of `HostCalls.start_read`, because a thread answers it.
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

        The docstring of the module lists the three cases.
        """
        return (
            self._load.polled_reads > 0
            or self._calls.resuming > 0
            or self._load.has_running_threads()
        )

    async def _run_other_tasks(self) -> None:
        """Let all other runnable tasks run, those whose calls have finished included."""
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

        The caller is about to keep the event loop busy.  So `end_queued_reads` is called first: it
        passes reads that are not submitted yet to the kernel, and answers those that have ended.

        Before the first call of `wait_readable` the result is False, because the descriptor is
        not known yet.
        """
        end_queued_reads()
        return self._fd >= 0 and bool(self._poller.poll(0))

    def notify_closing(self, fd: int) -> None:
        """End the call of `wait_readable` that waits for ``fd``; no later call waits.

        A later call raises trio.ClosedResourceError where it would have to wait.
        """
        self._closing = True
        trio.lowlevel.notify_closing(fd)


def default_poll_seconds() -> float:
    """Return the maximum time to poll on this machine, in seconds.

    If the process may run on one processor only, the result is 0, because polling would delay
    the program that makes requests.
    """
    return DEFAULT_POLL_SECONDS if len(os.sched_getaffinity(0)) > 1 else 0.0


@contextmanager
def scheduled(poll_seconds: float | None) -> Iterator[Scheduler]:
    """Make pyfuse3 use a `Scheduler` in the block, and yield the scheduler.

    The caller must make all calls of `pyfuse3.main` in one block, because pyfuse3 makes its lock
    in the first call and keeps the lock for later calls.

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
