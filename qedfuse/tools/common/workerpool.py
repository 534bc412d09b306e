"""A pool of worker threads that take item after item from one iterator.

Switching to a worker thread and back costs more than the work on one item, so each thread
keeps taking items until none is left.  Steps that must happen in the order of the items are
ordered by tickets.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from qedfuse.util.backgroundtasks import background_tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")


class Ticket:
    """An item's position in the order of items: its turn begins when the previous one ends."""

    def __init__(self, previous: Ticket | None) -> None:
        """Come after another ticket; None for the first."""
        self._previous = previous
        self._finished = threading.Event()

    def wait(self) -> None:
        """Block the thread until the previous ticket is finished.

        The previous item was taken earlier, so a thread is already working on it: there is
        no deadlock.
        """
        if self._previous is not None:
            self._previous._finished.wait()  # noqa: SLF001  the same class
            self._previous = None

    def finish(self) -> None:
        """Let the next ticket's turn begin.  A second call does nothing."""
        self._previous = None
        self._finished.set()


class WorkerPool(Generic[T]):
    """A few threads, each with its own function that is called with items and their tickets."""

    def __init__(self, workers: Sequence[Callable[[T, Ticket], None]]) -> None:
        """Use one thread for each function, which may own buffers: its calls do not overlap."""
        self._workers = workers
        self._taking = threading.Lock()
        self._last: Ticket | None = None

    async def run(self, items: Iterator[T]) -> None:
        """Process all items; an exception in one thread ends the work of all.

        After a cancellation each thread finishes the item that it has taken.
        """
        for first in items:
            # Starts no thread without an item: large disks have long ranges with no work.
            remaining = chain((first,), items)
            async with background_tasks() as nursery:
                for worker in self._workers:
                    nursery.start_soon(trio.to_thread.run_sync, self._serve, worker, remaining)

    def _serve(self, worker: Callable[[T, Ticket], None], items: Iterator[T]) -> None:
        """Take item after item, in a worker thread, until none is left."""
        while True:
            trio.from_thread.check_cancelled()
            with self._taking:
                try:
                    item = next(items)
                except StopIteration:
                    return
                ticket = self._last = Ticket(self._last)
            try:
                worker(item, ticket)
            finally:
                # Without this the items after one that failed would wait forever.
                ticket.finish()
