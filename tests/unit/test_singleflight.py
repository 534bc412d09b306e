"""Concurrent requests for one key share one fetch."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.util.singleflight import SingleFlight


async def test_askers_share_one_fetch() -> None:
    """A request during a fetch of the same key waits for it and does not fetch."""
    flights: SingleFlight[str] = SingleFlight()
    go = trio.Event()
    fetched = 0
    leaders: list[bool] = []

    async def fetch() -> None:
        nonlocal fetched
        fetched += 1
        await go.wait()

    async def ask() -> None:
        leaders.append(await flights.run("key", fetch))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert fetched == 1
        go.set()
    assert sorted(leaders) == [False] * 4 + [True]


async def test_other_keys_do_not_wait() -> None:
    """Fetches of different keys run concurrently."""
    flights: SingleFlight[int] = SingleFlight()
    go = trio.Event()
    running = 0

    async def fetch() -> None:
        nonlocal running
        running += 1
        await go.wait()

    async with trio.open_nursery() as nursery:
        for key in range(3):
            nursery.start_soon(flights.run, key, fetch)
        await wait_all_tasks_blocked()
        assert running == 3
        go.set()


async def test_next_asker_fetches_again() -> None:
    """A request after the end of a fetch fetches again."""
    flights: SingleFlight[str] = SingleFlight()
    fetched = 0

    async def fetch() -> None:
        nonlocal fetched
        fetched += 1

    assert await flights.run("key", fetch)
    assert await flights.run("key", fetch)
    assert fetched == 2


async def test_error_is_the_leader_s_alone() -> None:
    """Tasks that waited for a failed fetch look again, and do not get its error."""
    flights: SingleFlight[str] = SingleFlight()
    go = trio.Event()
    waited: list[bool] = []

    async def fail() -> None:
        await go.wait()
        raise LookupError

    async def lead() -> None:
        with pytest.raises(LookupError):
            await flights.run("key", fail)

    async def follow() -> None:
        waited.append(await flights.run("key", fail))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lead)
        await wait_all_tasks_blocked()
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        go.set()
    assert waited == [False]


async def test_cancelled_leader_wakes_the_others() -> None:
    """A cancelled fetch wakes the tasks that wait for it."""
    flights: SingleFlight[str] = SingleFlight()
    outcome: list[bool] = []

    async def follow() -> None:
        outcome.append(await flights.run("key", trio.sleep_forever))

    async with trio.open_nursery() as nursery, trio.open_nursery() as inner:
        inner.start_soon(flights.run, "key", trio.sleep_forever)
        await wait_all_tasks_blocked()
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
    assert outcome == [False]
