"""Threads that take one item after the other: all of them, in order, and not after a failure."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.tools.common.workerpool import Ticket, WorkerPool
from qedfuse.util.periodicprogress import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_turns_come_in_order(threads: int) -> None:
    """Whoever is done first."""
    before, within = [], []
    begun = [threading.Event() for _ in range(150)]

    def hand(item: int, turn: Ticket) -> None:
        begun[item].set()
        if item % 7 == 0 and threads > 1:
            # Another one overtakes this one.
            begun[item + 1].wait()
        before.append(item)
        turn.wait()
        within.append(item)

    async def work() -> None:
        crew = WorkerPool([hand] * threads)
        await crew.work(iter(range(100)))
        await crew.work(iter(range(100, 150)))

    trio.run(work)
    assert within == list(range(150))
    assert (before == within) == (threads == 1)


def test_a_failure_ends_the_work_of_all() -> None:
    """Items are not taken any more, and nobody waits for the turn of the one that failed."""
    taken = []

    def items() -> Callable[[], int]:
        numbers = iter(range(1_000_000))
        return lambda: next(numbers)

    def hand(item: int, turn: Ticket) -> None:
        taken.append(item)
        if item == 5:
            msg = "the sixth"
            raise ValueError(msg)
        turn.wait()

    with pytest.raises(ValueError, match="the sixth"):
        trio.run(WorkerPool([hand] * 3).work, iter(items(), -1))
    assert len(taken) < 1_000_000


def test_a_cancellation_lets_the_items_be_finished() -> None:
    """Each thread ends what it has, and takes nothing more."""
    begun, ended = [], []

    async def work() -> None:
        with trio.CancelScope() as scope:

            def hand(item: int, _turn: Ticket) -> None:
                begun.append(item)
                if item == 10:
                    trio.from_thread.run_sync(scope.cancel)
                ended.append(item)

            await WorkerPool([hand] * 2).work(iter(range(1_000_000)))
        assert scope.cancelled_caught

    trio.run(work)
    assert sorted(begun) == sorted(ended)
    assert 10 in ended
    assert len(ended) < 1_000_000


def test_reports_begin_at_once_and_end_with_the_block() -> None:
    """A short piece of work is reported twice; one that failed has no last report."""
    reports = []

    async def work(error: Exception | None) -> None:
        async with periodic_progress(lambda: reports.append(len(reports))):
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            if error is not None:
                raise error

    trio.run(work, None)
    assert reports == [0, 1]
    with pytest.raises(ValueError, match="bad"):
        trio.run(work, ValueError("bad"))
    assert reports == [0, 1, 2]
