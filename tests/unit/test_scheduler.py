"""The scheduler of pyfuse3: which task reads, how long to poll, and when other tasks run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.hostio.threadcalls import ThreadCalls
from qedfuse.mount.fuse.scheduler import (
    EXTENSION_POLL_SECONDS,
    MAX_BURST,
    MAX_BURST_BESIDE_OTHERS,
    MAX_BURST_BESIDE_READS,
    Scheduler,
    default_poll_seconds,
    scheduled,
)
from qedfuse.mount.fuse.unfairlock import UnfairLock
from qedfuse.remote.flight import Flight
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Iterator

POLL_SECONDS: Final = 100e-6


class Clock:
    """A clock that advances by ``step`` seconds with each reading."""

    def __init__(self, step: float = 10e-6) -> None:
        """Start at 0."""
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        """Return the time."""
        self.now += self.step
        return self.now


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Make a pipe: requests are read from the first end and written to the second."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


# --- the lock -------------------------------------------------------------------------------


async def test_the_last_holder_can_barge_before_the_waiters() -> None:
    """A task acquires the lock again before a waiter; when it waits, the waiter gets the lock."""
    lock, order = UnfairLock(), []

    async def other() -> None:
        async with lock:
            order.append("other")

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(other)
            await wait_all_tasks_blocked()
        for number in range(3):
            async with lock:
                order.append(str(number))
        await wait_all_tasks_blocked()
        async with lock:
            order.append("last")
    assert order == ["0", "1", "2", "other", "last"]


async def test_at_most_one_task_holds_the_lock() -> None:
    """With tasks that wait, work and are cancelled, one holds the lock, and none waits forever."""
    lock = UnfairLock()
    holders = most = served = 0

    async def work(number: int) -> None:
        nonlocal holders, most, served
        for step in range(20):
            with trio.move_on_after(0 if (number + step) % 7 == 0 else 60):
                async with lock:
                    holders += 1
                    most = max(most, holders)
                    try:
                        for _ in range((number * step) % 4):
                            await trio.lowlevel.checkpoint()
                        served += 1
                    finally:
                        holders -= 1
                for _ in range((number + step) % 3):
                    await trio.lowlevel.checkpoint()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(work, number)
    assert most == 1
    assert served > 100


async def test_a_cancelled_waiter_leaves_the_lock_to_the_next() -> None:
    """A cancelled waiter is removed from the queue, and all others get the lock."""
    lock, got = UnfairLock(), []

    async def wait(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                got.append(name)

    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery, lock:
        for number, scope in enumerate(scopes):
            nursery.start_soon(wait, str(number), scope)
        await wait_all_tasks_blocked()
        scopes[1].cancel()
        await wait_all_tasks_blocked()
    assert sorted(got) == ["0", "2"]


# --- polling --------------------------------------------------------------------------------


async def test_a_request_that_is_there_is_taken_without_a_checkpoint(
    pipe: tuple[int, int],
) -> None:
    """After `MAX_BURST` ready requests in a row all other tasks run once."""
    os.write(pipe[1], b"x")
    scheduler, runs = Scheduler(POLL_SECONDS, Clock()), 0

    async def others() -> None:
        nonlocal runs
        while True:
            await trio.lowlevel.checkpoint()
            runs += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await trio.lowlevel.checkpoint()
        before = runs
        for _ in range(MAX_BURST - 1):
            await scheduler.wait_readable(pipe[0])
        assert runs == before
        # trio runs runnable tasks in random order.
        for _ in range(2 * MAX_BURST + 1):
            await scheduler.wait_readable(pipe[0])
        assert before < runs <= before + 3
        nursery.cancel_scope.cancel()
    assert scheduler.statistics.ready == 3 * MAX_BURST
    assert scheduler.statistics.yields == 3


async def test_requests_that_the_extension_has_taken_count_as_taken_in_a_row(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit `MAX_BURST` covers the requests that the extension has taken itself."""
    os.write(pipe[1], b"x")
    monkeypatch.setattr("qedfuse.mount.fuse.scheduler.take_burst_count", lambda: 7)
    scheduler = Scheduler(POLL_SECONDS, Clock())
    for _ in range(MAX_BURST // 8 - 1):
        await scheduler.wait_readable(pipe[0])
    assert scheduler.statistics.yields == 0
    await scheduler.wait_readable(pipe[0])
    assert scheduler.statistics.yields == 1
    assert scheduler.statistics.ready == MAX_BURST


async def test_other_tasks_run_more_often_while_a_thread_is_running(pipe: tuple[int, int]) -> None:
    """Another request waits for the thread, so bursts are shorter."""
    os.write(pipe[1], b"x")
    scheduler = Scheduler(POLL_SECONDS, Clock())
    async with trio.to_thread.current_default_thread_limiter():
        for _ in range(MAX_BURST):
            await scheduler.wait_readable(pipe[0])
    assert scheduler.statistics.yields == MAX_BURST // MAX_BURST_BESIDE_OTHERS


async def test_the_next_request_is_polled_for_if_that_has_succeeded(pipe: tuple[int, int]) -> None:
    """A request that arrives while polling is taken without sleeping."""
    clock = Clock()
    scheduler = Scheduler(POLL_SECONDS, clock)

    class Sender(Clock):
        """A clock that sends a request after some readings."""

        def __call__(self) -> float:
            """Send a request when half of the polling time is over."""
            if super().__call__() > POLL_SECONDS / 2:
                os.write(pipe[1], b"x")
                self.step = 0
            return self.now

    # The event loop sleeps for a first request, which arrives soon enough to enable polling.
    clock.step = 1e-6
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scheduler.wait_readable, pipe[0])
        await wait_all_tasks_blocked()
        os.write(pipe[1], b"x")
    assert (scheduler.statistics.slept, scheduler.statistics.polled) == (1, 0)
    os.read(pipe[0], 1)
    scheduler._clock = Sender()
    with trio.fail_after(60):
        await scheduler.wait_readable(pipe[0])
    assert (scheduler.statistics.slept, scheduler.statistics.polled) == (1, 1)


async def test_the_next_request_is_polled_for_before_other_tasks_run_while_reads_are_queued(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While polling, ended reads are answered; other tasks run after a number of requests."""
    ends = 0

    def end_queued_reads() -> None:
        """Answer a read at each third call; the kernel then has the next request."""
        nonlocal ends
        ends += 1
        if ends % 3 == 0:
            os.write(pipe[1], b"x")

    monkeypatch.setattr("qedfuse.mount.fuse.scheduler.queued_reads", lambda: 1)
    monkeypatch.setattr("qedfuse.mount.fuse.scheduler.end_queued_reads", end_queued_reads)
    scheduler = Scheduler(POLL_SECONDS, Clock(step=1e-6))
    scheduler._adaptive_poll.record(0.0, slept=False)
    with trio.fail_after(60):
        for taken in range(1, 2 * MAX_BURST_BESIDE_READS + 2):
            await scheduler.wait_readable(pipe[0])
            os.read(pipe[0], 1)
            assert scheduler.statistics.yields == taken // (MAX_BURST_BESIDE_READS + 1)
    assert scheduler.statistics.polled == 2 * MAX_BURST_BESIDE_READS + 1
    assert scheduler.statistics.slept == 0


async def test_without_polling_the_event_loop_sleeps_beside_queued_reads(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a poll time of 0 other tasks run before each wait, and nothing is polled."""
    monkeypatch.setattr("qedfuse.mount.fuse.scheduler.queued_reads", lambda: 1)
    scheduler = Scheduler(0, Clock(step=0))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scheduler.wait_readable, pipe[0])
            await wait_all_tasks_blocked()
            os.write(pipe[1], b"x")
    assert (scheduler.statistics.yields, scheduler.statistics.slept) == (1, 1)


async def test_queued_reads_are_submitted_before_a_long_call(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that asks whether requests wait is about to keep the event loop from ending reads."""
    ends: list[str] = []
    monkeypatch.setattr("qedfuse.mount.fuse.scheduler.end_queued_reads", lambda: ends.append("end"))
    with scheduled(POLL_SECONDS) as scheduler:
        os.write(pipe[1], b"x")
        await scheduler.wait_readable(pipe[0])
        ends.clear()
        assert loop_load().has_requests()
        assert ends == ["end"]


async def test_no_polling_while_a_read_is_polled_for(pipe: tuple[int, int]) -> None:
    """The read ends only if its task runs, so the event loop must not poll here."""
    scheduler = Scheduler(POLL_SECONDS, Clock(step=0))
    scheduler._adaptive_poll.record(0.0, slept=False)
    loop_load().polled_reads += 1
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(scheduler.wait_readable, pipe[0])
                await wait_all_tasks_blocked()
                os.write(pipe[1], b"x")
    finally:
        loop_load().polled_reads -= 1
    assert scheduler.statistics.slept == 1


async def test_no_polling_while_a_thread_is_running(pipe: tuple[int, int]) -> None:
    """Only trio notices the end of the thread, so the event loop sleeps in trio."""
    scheduler = Scheduler(POLL_SECONDS, Clock(step=0))
    scheduler._adaptive_poll.record(0.0, slept=False)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await trio.to_thread.current_default_thread_limiter().acquire()
            try:
                # With a clock that does not advance, polling would never end.
                nursery.start_soon(scheduler.wait_readable, pipe[0])
                await wait_all_tasks_blocked()
                os.write(pipe[1], b"x")
            finally:
                trio.to_thread.current_default_thread_limiter().release()
    assert scheduler.statistics.slept == 1
    assert scheduler._adaptive_poll.seconds, "a wait beside other work was recorded"


async def test_no_polling_while_a_read_waits_for_a_server(pipe: tuple[int, int]) -> None:
    """The thread that fetches needs the GIL, and only trio notices its end."""
    scheduler = Scheduler(POLL_SECONDS, Clock(step=0))
    scheduler._adaptive_poll.record(0.0, slept=False)
    flight = Flight(0, 0, "object", 60.0, 10.0)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flight.wait)
            await wait_all_tasks_blocked()
            assert loop_load().has_running_threads()
            nursery.start_soon(scheduler.wait_readable, pipe[0])
            await wait_all_tasks_blocked()
            os.write(pipe[1], b"x")
            flight.end()
    assert not loop_load().has_running_threads()
    assert scheduler.statistics.slept == 1


class Permissions:
    """What the extension may do, as the scheduler has said last.

    Attributes:
        said: The arguments of each call; an empty tuple stands for a prohibition.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, polled: float = 0.0) -> None:
        """Stand between the scheduler and the extension, which ``polled`` in vain for seconds."""
        self.said: list[tuple[object, ...]] = []
        for name, function in {
            "permit_polling": lambda *said: self.said.append(said),
            "forbid_polling": lambda: self.said.append(()),
            "take_polled_seconds": lambda: polled,
        }.items():
            monkeypatch.setattr(f"qedfuse.mount.fuse.scheduler.{name}", function)


async def test_the_extension_may_poll_after_other_tasks_have_run(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a short wait, and after each `MAX_BURST` requests, the extension may poll again."""
    permissions = Permissions(monkeypatch)
    calls = ThreadCalls()
    scheduler = Scheduler(POLL_SECONDS, Clock(step=1e-6), calls)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scheduler.wait_readable, pipe[0])
        await wait_all_tasks_blocked()
        os.write(pipe[1], b"x")
    permitted = (POLL_SECONDS, EXTENSION_POLL_SECONDS, calls.has_finished)
    assert permissions.said == [permitted]
    for _ in range(2 * MAX_BURST):
        await scheduler.wait_readable(pipe[0])
    assert scheduler.statistics.ready == 2 * MAX_BURST
    assert permissions.said == [permitted] * 3


async def test_the_extension_may_not_poll_where_the_scheduler_does_not(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extension polls neither beside a thread of trio nor while polling does not pay off."""
    permissions = Permissions(monkeypatch)
    os.write(pipe[1], b"x")
    scheduler = Scheduler(POLL_SECONDS, Clock())
    for _ in range(MAX_BURST):
        await scheduler.wait_readable(pipe[0])
    assert permissions.said == [()], "no wait was short so far"
    scheduler._adaptive_poll.record(0.0, slept=False)
    async with trio.to_thread.current_default_thread_limiter():
        for _ in range(MAX_BURST_BESIDE_OTHERS + 1):
            await scheduler.wait_readable(pipe[0])
    assert permissions.said == [()] * (MAX_BURST_BESIDE_OTHERS + 3)


async def test_the_time_that_the_extension_has_polled_counts(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the extension has polled in vain, the scheduler polls once and sleeps."""
    Permissions(monkeypatch, polled=POLL_SECONDS)
    scheduler = Scheduler(POLL_SECONDS, Clock(step=0))
    scheduler._adaptive_poll.record(0.0, slept=False)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            # With a clock that does not advance, polling for the whole time would never end.
            nursery.start_soon(scheduler.wait_readable, pipe[0])
            await wait_all_tasks_blocked()
            os.write(pipe[1], b"x")
    assert (scheduler.statistics.failed_polls, scheduler.statistics.slept) == (1, 1)


class FinishedCalls(ThreadCalls):
    """Calls of which a test says when they are finished; their tasks wait for `delivered`.

    Attributes:
        finished: How many calls are finished and not delivered.
        resuming: How many tasks were made runnable and have not run.
        ended: How many tasks have run.
    """

    def __init__(self) -> None:
        """Start without calls."""
        self.finished = self.resuming = self.ended = 0
        self._waiting: list[trio.lowlevel.Task] = []

    def has_finished(self) -> bool:
        """Return whether there are finished calls."""
        return self.finished > 0

    def deliver(self) -> None:
        """Resume one task for each finished call."""
        for _ in range(self.finished):
            self.resuming += 1
            trio.lowlevel.reschedule(self._waiting.pop())
        self.finished = 0

    async def wait(self) -> None:
        """Wait for the end of one call."""
        self._waiting.append(trio.lowlevel.current_task())
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        self.resuming -= 1
        self.ended += 1


@pytest.mark.parametrize("count", [1, 5])
async def test_tasks_whose_calls_finish_during_a_poll_run_at_once(
    pipe: tuple[int, int], count: int
) -> None:
    """A finished call ends the poll, its task runs, and then the poll continues."""
    calls = FinishedCalls()
    readings = 0

    class Finisher(Clock):
        """A clock that ends the calls while the task polls, and then sends a request."""

        def __call__(self) -> float:
            """Finish the calls at the third reading; send the request once the tasks have run."""
            nonlocal readings
            readings += 1
            if readings == 3:
                calls.finished = count
            assert readings <= 3 or calls.ended == count, "polled while a task could run"
            if readings == 6:
                os.write(pipe[1], b"x")
            return super().__call__()

    scheduler = Scheduler(POLL_SECONDS, Finisher(step=1e-6), calls)
    scheduler._adaptive_poll.record(0.0, slept=False)
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(calls.wait)
        await wait_all_tasks_blocked()
        with trio.fail_after(60):
            await scheduler.wait_readable(pipe[0])
        assert calls.ended == count
    assert readings >= 6
    assert (scheduler.statistics.slept, scheduler.statistics.polled) == (0, 1)


async def test_a_burst_of_requests_delivers_finished_calls(pipe: tuple[int, int]) -> None:
    """While requests keep coming, tasks whose calls have finished become runnable."""
    os.write(pipe[1], b"x")
    calls = FinishedCalls()
    scheduler = Scheduler(POLL_SECONDS, Clock(), calls)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.wait)
        await wait_all_tasks_blocked()
        calls.finished = 1
        await scheduler.wait_readable(pipe[0])
        assert (calls.finished, calls.resuming, calls.ended) == (0, 1, 0)
        for _ in range(MAX_BURST_BESIDE_OTHERS):
            await scheduler.wait_readable(pipe[0])
        assert (calls.resuming, calls.ended) == (0, 1)


@pytest.mark.parametrize("asleep", [True, False])
async def test_closing_ends_current_and_later_waits(pipe: tuple[int, int], *, asleep: bool) -> None:
    """A mount that ends does not wait for another request."""
    scheduler = Scheduler(POLL_SECONDS, Clock())
    ended = []

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await scheduler.wait_readable(pipe[0])
        ended.append(True)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            if asleep:
                await wait_all_tasks_blocked()
            scheduler.notify_closing(pipe[0])
        await wait()
    assert len(ended) == 2


async def test_waiting_requests_are_reported_to_other_tasks(pipe: tuple[int, int]) -> None:
    """Code that is about to block the event loop can ask whether a request is waiting."""
    with scheduled(0.0) as scheduler:
        assert not loop_load().has_requests()
        os.write(pipe[1], b"x")
        await scheduler.wait_readable(pipe[0])
        assert loop_load().has_requests()
        os.read(pipe[0], 1)
        assert not loop_load().has_requests()
        os.write(pipe[1], b"x")
    assert not loop_load().has_requests()


def test_a_machine_with_one_processor_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling would take the processor from the program that sends the next request."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert default_poll_seconds() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 3})
    assert default_poll_seconds() > 0


def test_the_limit_of_polling_is_documented() -> None:
    """The page about tasks states for how long the extension may poll."""
    page = Path(__file__).parents[2] / "docs" / "concurrency.md"
    assert f"only within {EXTENSION_POLL_SECONDS * 1e3:.0f} ms" in page.read_text("utf-8")
