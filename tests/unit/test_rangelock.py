"""Tasks wait for overlapping ranges, in order, and not for others."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.util.rangelock import RangeLock


async def test_overlapping_claims_wait_in_order() -> None:
    """Tasks get overlapping ranges in the order in which they asked."""
    lock = RangeLock()
    order: list[int] = []

    async def claim(number: int) -> None:
        async with lock.hold(0, 10):
            order.append(number)

    async with trio.open_nursery() as nursery, lock.hold(5, 6):
        for number in range(3):
            nursery.start_soon(claim, number)
            await wait_all_tasks_blocked()
        assert lock.held == 1
        assert lock.waiting == 3
        assert order == []
    assert order == [0, 1, 2]
    assert lock.held == 0


async def test_neighbours_do_not_wait() -> None:
    """Adjacent ranges are held at the same time."""
    lock = RangeLock()
    async with lock.hold(0, 10), lock.hold(10, 20), lock.hold(20, 30):
        assert lock.held == 3


@pytest.mark.parametrize(("start", "end"), [(5, 5), (0, 0), (7, 3)])
async def test_an_empty_range_overlaps_no_range(start: int, end: int) -> None:
    """An empty range inside a held one is free, waits for no task, and makes no task wait."""
    lock = RangeLock()
    async with lock.hold(0, 10):
        assert lock.is_free(start, end)
        with trio.fail_after(60):
            async with lock.hold(start, end):
                assert lock.held == 1
    async with lock.hold(start, end):
        assert lock.is_free(0, 10)


async def test_uncontended_claim_does_not_yield() -> None:
    """Taking a free range runs no other task."""
    lock = RangeLock()
    other_ran = trio.Event()

    async def other() -> None:
        other_ran.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with lock.hold(0, 1):
            assert not other_ran.is_set()


async def test_later_claim_does_not_pass_an_earlier_waiter() -> None:
    """A task waits for earlier waiters of overlapping ranges, so no wide range starves."""
    lock = RangeLock()
    order: list[str] = []

    async def claim(name: str, start: int, end: int) -> None:
        async with lock.hold(start, end):
            order.append(name)

    async with trio.open_nursery() as nursery, lock.hold(0, 1):
        nursery.start_soon(claim, "wide", 0, 100)
        await wait_all_tasks_blocked()
        nursery.start_soon(claim, "narrow", 50, 51)
        await wait_all_tasks_blocked()
        assert order == []
    assert order == ["wide", "narrow"]


async def test_cancelled_waiter_is_forgotten() -> None:
    """A cancelled waiter does not block later ones."""
    lock = RangeLock()
    done: list[str] = []

    async def claim(name: str, start: int, end: int) -> None:
        async with lock.hold(start, end):
            done.append(name)

    async with trio.open_nursery() as nursery, lock.hold(0, 1):
        async with trio.open_nursery() as inner:
            inner.start_soon(claim, "gave up", 0, 100)
            await wait_all_tasks_blocked()
            nursery.start_soon(claim, "behind", 50, 60)
            await wait_all_tasks_blocked()
            inner.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert done == ["behind"]
    assert lock.held == lock.waiting == 0


async def test_failure_inside_lets_go() -> None:
    """An exception in the block releases the range."""
    lock = RangeLock()
    with pytest.raises(LookupError):
        async with lock.hold(0, 1):
            raise LookupError
    assert lock.held == 0


@pytest.mark.parametrize("seed", range(5))
async def test_never_two_owners(seed: int) -> None:
    """Many tasks on random ranges never hold a number together, and all get their range."""
    rng = random.Random(seed)
    lock = RangeLock()
    owned: set[int] = set()
    served = 0

    async def claim(start: int, end: int, pauses: int) -> None:
        nonlocal served
        async with lock.hold(start, end):
            mine = set(range(start, end))
            assert not mine & owned
            owned.update(mine)
            for _ in range(pauses):
                await trio.lowlevel.checkpoint()
            owned.difference_update(mine)
            served += 1

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            start = rng.randrange(50)
            nursery.start_soon(claim, start, start + rng.randrange(1, 20), rng.randrange(4))
    assert served == 100
    assert lock.held == lock.waiting == 0
