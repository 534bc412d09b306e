"""Worker threads that take one item of work after the other, until none is left.

A hop to a worker thread and back costs more than what is done with an item, so a thread
stays with the work.  Where order matters an item waits for its turn.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")


class Ticket:
    """An item's place in the order: after the one before has ended its turn."""

    def __init__(self, before: Ticket | None) -> None:
        """Come after another one."""
        self._before = before
        self._over = threading.Event()

    def wait(self) -> None:
        """Wait for the one before; it was begun earlier, so it is under way."""
        if self._before is not None:
            self._before._over.wait()  # noqa: SLF001  one of our own kind
            self._before = None

    def end(self) -> None:
        """Let the next one have its turn."""
        self._before = None
        self._over.set()


class WorkerPool(Generic[T]):
    """A few threads, each with a function of its own for what it takes."""

    def __init__(self, hands: Sequence[Callable[[T, Ticket], None]]) -> None:
        """Have one thread for each function; they get an item and its turn."""
        self._hands = hands
        self._taking = threading.Lock()
        self._last: Ticket | None = None

    async def work(self, items: Iterator[T]) -> None:
        """Have all items worked on; what one of the threads raises ends the work of all.

        A cancellation takes effect when each thread is done with the item it has.
        """
        for first in items:
            # Large disks have long ranges with nothing to do.
            left = chain((first,), items)
            async with open_scope() as nursery:
                for hand in self._hands:
                    nursery.start_soon(trio.to_thread.run_sync, self._serve, hand, left)

    def _serve(self, hand: Callable[[T, Ticket], None], items: Iterator[T]) -> None:
        """Take one item after the other, in a worker thread."""
        while True:
            trio.from_thread.check_cancelled()
            with self._taking:
                try:
                    item = next(items)
                except StopIteration:
                    return
                turn = self._last = Ticket(self._last)
            try:
                hand(item, turn)
            finally:
                # Nobody must wait for what has failed.
                turn.end()
