"""Requests are counted by turns, and a turn is over when the last of its requests has ended."""

from __future__ import annotations

import trio

from qedfuse.disk.grace import Grace
from tests.support.disks import settle


def test_a_turn_without_requests_is_over_at_once() -> None:
    """Nobody has to be waited for."""
    grace = Grace()
    assert grace.over(grace.turn())


def test_a_turn_waits_for_all_that_began_before() -> None:
    """Also for those of earlier turns, and for nobody that began later."""
    grace = Grace()
    early = grace.enter()
    first = grace.turn()
    late = grace.enter()
    second = grace.turn()
    after = grace.enter()
    grace.leave(late)
    assert not grace.over(first)
    assert not grace.over(second), "a request of the turn before is still under way"
    grace.leave(early)
    assert grace.over(first)
    assert grace.over(second)
    grace.leave(after)


async def test_waiting_for_a_turn() -> None:
    """Who waits is woken when it is over, and not before."""
    grace = Grace()
    request = grace.enter()
    turn = grace.turn()
    ended: list[int] = []

    async def wait(number: int) -> None:
        await grace.wait(turn)
        ended.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, 1)
        nursery.start_soon(wait, 2)
        await settle()
        assert ended == []
        grace.leave(request)
    assert sorted(ended) == [1, 2]
    await grace.wait(turn)
