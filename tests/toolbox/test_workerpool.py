"""A worker pool processes all items, in order where that matters, and stops after a failure."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.tools.common.workerpool import Ticket, WorkerPool
from qedfuse.util.backgroundtasks import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tickets_are_served_in_order(threads: int) -> None:
    """A worker that overtakes another still waits for the turn of the earlier item."""
    before, within = [], []
    begun = [threading.Event() for _ in range(150)]

    def worker(item: int, ticket: Ticket) -> None:
        begun[item].set()
        if item % 7 == 0 and threads > 1:
            # The next item overtakes this one.
            begun[item + 1].wait()
        before.append(item)
        ticket.wait()
        within.append(item)

    async def work() -> None:
        pool = WorkerPool([worker] * threads)
        await pool.run(iter(range(100)))
        await pool.run(iter(range(100, 150)))

    trio.run(work)
    assert within == list(range(150))
    assert (before == within) == (threads == 1)


def test_a_failure_stops_all_threads() -> None:
    """No further items are taken, and no thread waits for the turn of the item that failed."""
    taken = []

    def items() -> Callable[[], int]:
        numbers = iter(range(1_000_000))
        return lambda: next(numbers)

    def worker(item: int, ticket: Ticket) -> None:
        taken.append(item)
        if item == 5:
            msg = "the sixth"
            raise ValueError(msg)
        ticket.wait()

    with pytest.raises(ValueError, match="the sixth"):
        trio.run(WorkerPool([worker] * 3).run, iter(items(), -1))
    assert len(taken) < 1_000_000


def test_a_cancellation_finishes_the_items_taken() -> None:
    """After a cancellation each thread finishes its item and takes no other."""
    begun, ended = [], []

    async def work() -> None:
        with trio.CancelScope() as scope:

            def worker(item: int, _ticket: Ticket) -> None:
                begun.append(item)
                if item == 10:
                    trio.from_thread.run_sync(scope.cancel)
                ended.append(item)

            await WorkerPool([worker] * 2).run(iter(range(1_000_000)))
        assert scope.cancelled_caught

    trio.run(work)
    assert sorted(begun) == sorted(ended)
    assert 10 in ended
    assert len(ended) < 1_000_000


def test_reports_begin_with_the_block_and_end_with_it() -> None:
    """Work that ends early is reported twice; work that fails has no last report."""
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
