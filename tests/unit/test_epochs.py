"""Requests are counted by turns, and a turn is over when the last of its requests has ended."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.space.epochs import Epochs


def test_a_turn_without_requests_is_over_at_once() -> None:
    """Nobody has to be waited for."""
    epochs = Epochs()
    assert epochs.is_drained(epochs.advance())


def test_a_turn_waits_for_all_that_began_before() -> None:
    """Also for those of earlier turns, and for nobody that began later."""
    epochs = Epochs()
    early = epochs.enter()
    first = epochs.advance()
    late = epochs.enter()
    second = epochs.advance()
    after = epochs.enter()
    epochs.leave(late)
    assert not epochs.is_drained(first)
    assert not epochs.is_drained(second), "a request of the turn before is still under way"
    epochs.leave(early)
    assert epochs.is_drained(first)
    assert epochs.is_drained(second)
    epochs.leave(after)


async def test_waiting_for_a_turn() -> None:
    """Who waits is woken when it is over, and not before."""
    epochs = Epochs()
    request = epochs.enter()
    advance = epochs.advance()
    ended: list[int] = []

    async def wait(number: int) -> None:
        await epochs.wait(advance)
        ended.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, 1)
        nursery.start_soon(wait, 2)
        await wait_all_tasks_blocked()
        assert ended == []
        epochs.leave(request)
    assert sorted(ended) == [1, 2]
    await epochs.wait(advance)
