"""The scheduler that pyfuse3 runs on: who reads next, how long to poll, and who gets a turn."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.mount.fuse.scheduler import (
    BURST,
    BURST_BESIDE_OTHERS,
    Scheduler,
    UnfairLock,
    default_poll_seconds,
    scheduled,
)
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Iterator

WINDOW: Final = 100e-6


class Clock:
    """Time that goes on by ``step`` seconds whenever somebody looks."""

    def __init__(self, step: float = 10e-6) -> None:
        """Start at 0."""
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        """Tell the time."""
        self.now += self.step
        return self.now


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Give the two ends of a pipe: the first to wait on, the second to write requests to."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


# --- the lock -------------------------------------------------------------------------------


async def test_the_holder_gets_the_baton_back_before_who_waits() -> None:
    """Until it waits for something else: then the one who waits takes over."""
    baton, order = UnfairLock(), []

    async def other() -> None:
        async with baton:
            order.append("other")

    async with trio.open_nursery() as nursery:
        async with baton:
            nursery.start_soon(other)
            await wait_all_tasks_blocked()
        for number in range(3):
            async with baton:
                order.append(str(number))
        await wait_all_tasks_blocked()
        async with baton:
            order.append("last")
    assert order == ["0", "1", "2", "other", "last"]


async def test_nobody_holds_the_baton_beside_another() -> None:
    """Whoever waits, works and is cancelled how he likes: one at a time, and never none."""
    baton = UnfairLock()
    holders = most = served = 0

    async def work(number: int) -> None:
        nonlocal holders, most, served
        for turn in range(20):
            with trio.move_on_after(0 if (number + turn) % 7 == 0 else 60):
                async with baton:
                    holders += 1
                    most = max(most, holders)
                    try:
                        for _ in range((number * turn) % 4):
                            await trio.lowlevel.checkpoint()
                        served += 1
                    finally:
                        holders -= 1
                for _ in range((number + turn) % 3):
                    await trio.lowlevel.checkpoint()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(work, number)
    assert most == 1
    assert served > 100


async def test_a_cancelled_waiter_leaves_the_baton_to_the_next() -> None:
    """Its place in the queue goes with it."""
    baton, got = UnfairLock(), []

    async def wait(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with baton:
                got.append(name)

    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery, baton:
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
    """But after a number of them everybody else has a turn."""
    os.write(pipe[1], b"x")
    scheduler, turns = Scheduler(WINDOW, Clock()), 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await trio.lowlevel.checkpoint()
        before = turns
        for _ in range(BURST - 1):
            await scheduler.wait_readable(pipe[0])
        assert turns == before
        # Which of the tasks that can run goes first is left to chance.
        for _ in range(2 * BURST + 1):
            await scheduler.wait_readable(pipe[0])
        assert before < turns <= before + 3
        nursery.cancel_scope.cancel()
    assert scheduler.statistics.waiting == 3 * BURST
    assert scheduler.statistics.turns == 3


async def test_more_turns_while_a_thread_is_at_work(pipe: tuple[int, int]) -> None:
    """What it brings is waited for by another request."""
    os.write(pipe[1], b"x")
    scheduler = Scheduler(WINDOW, Clock())
    async with trio.to_thread.current_default_thread_limiter():
        for _ in range(BURST):
            await scheduler.wait_readable(pipe[0])
    assert scheduler.statistics.turns == BURST // BURST_BESIDE_OTHERS


async def test_the_next_request_is_polled_for_when_that_pays(pipe: tuple[int, int]) -> None:
    """It comes while the clock is looked at: no sleep, no wake-up."""
    clock = Clock()
    scheduler = Scheduler(WINDOW, clock)

    class Sender(Clock):
        """A clock that sends a request while it is looked at."""

        def __call__(self) -> float:
            """Send when half of the window is over."""
            if super().__call__() > WINDOW / 2:
                os.write(pipe[1], b"x")
                self.step = 0
            return self.now

    # A first request that the loop sleeps for, and that comes soon enough.
    clock.step = 1e-6
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scheduler.wait_readable, pipe[0])
        await wait_all_tasks_blocked()
        os.write(pipe[1], b"x")
    assert (scheduler.statistics.slept, scheduler.statistics.polled) == (1, 0)
    os.read(pipe[0], 1)
    scheduler._clock = Sender()
    with trio.fail_after(5):
        await scheduler.wait_readable(pipe[0])
    assert (scheduler.statistics.slept, scheduler.statistics.polled) == (1, 1)


async def test_no_polling_while_a_read_is_polled_for(pipe: tuple[int, int]) -> None:
    """Its task has to run for it to end."""
    scheduler = Scheduler(WINDOW, Clock(step=0))
    scheduler._adaptive_poll.record(0.0, slept=False)
    loop_load.polled_reads += 1
    try:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(scheduler.wait_readable, pipe[0])
                await wait_all_tasks_blocked()
                os.write(pipe[1], b"x")
    finally:
        loop_load.polled_reads -= 1
    assert scheduler.statistics.slept == 1


async def test_no_polling_while_a_thread_is_at_work(pipe: tuple[int, int]) -> None:
    """Only trio sees its end, so the loop goes to trio."""
    scheduler = Scheduler(WINDOW, Clock(step=0))
    scheduler._adaptive_poll.record(0.0, slept=False)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await trio.to_thread.current_default_thread_limiter().acquire()
            try:
                # With a clock that stands still it would poll for ever.
                nursery.start_soon(scheduler.wait_readable, pipe[0])
                await wait_all_tasks_blocked()
                os.write(pipe[1], b"x")
            finally:
                trio.to_thread.current_default_thread_limiter().release()
    assert scheduler.statistics.slept == 1
    assert scheduler._adaptive_poll.seconds, "what came late because of others says nothing"


@pytest.mark.parametrize("asleep", [True, False])
async def test_the_end_reaches_who_waits_and_who_is_about_to(
    pipe: tuple[int, int], *, asleep: bool
) -> None:
    """A mount that is to end does not wait for one more request."""
    scheduler = Scheduler(WINDOW, Clock())
    ended = []

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await scheduler.wait_readable(pipe[0])
        ended.append(True)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            if asleep:
                await wait_all_tasks_blocked()
            scheduler.notify_closing(pipe[0])
        await wait()
    assert len(ended) == 2


async def test_whether_somebody_waits_can_be_asked(pipe: tuple[int, int]) -> None:
    """Who is about to keep the loop to himself asks."""
    with scheduled(0.0) as scheduler:
        assert not loop_load.has_requests()
        os.write(pipe[1], b"x")
        await scheduler.wait_readable(pipe[0])
        assert loop_load.has_requests()
        os.read(pipe[0], 1)
        assert not loop_load.has_requests()
        os.write(pipe[1], b"x")
    assert not loop_load.has_requests()


def test_a_machine_with_one_processor_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the processor from the one who is to send the next request."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert default_poll_seconds() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 3})
    assert default_poll_seconds() > 0
