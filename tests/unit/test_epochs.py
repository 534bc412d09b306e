"""Epochs: each request belongs to one, and it is drained when its last request has ended."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.space.epochs import Epochs


def test_an_epoch_without_requests_is_drained() -> None:
    """An epoch without requests is drained immediately."""
    epochs = Epochs()
    assert epochs.is_drained(epochs.advance())


def test_an_epoch_waits_for_all_earlier_requests() -> None:
    """An epoch is drained when all requests of it and of earlier ones have ended."""
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


def test_epochs_without_requests_take_no_memory() -> None:
    """While a request does not end, there are at most as many epochs as open requests and one."""
    epochs = Epochs()
    early = epochs.enter()
    first = epochs.advance()
    for _ in range(10):
        assert epochs.advance() is first
    assert len(epochs._epochs) == 2
    late = epochs.enter()
    second = epochs.advance()
    epochs.leave(early)
    assert epochs.is_drained(first)
    assert not epochs.is_drained(second)
    epochs.leave(late)
    assert epochs.is_drained(second)


async def test_waiting_for_an_epoch() -> None:
    """A task that waits for an epoch is woken exactly when it is drained."""
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
