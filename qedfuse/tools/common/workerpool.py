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
    """An item's position in the order of items; its turn begins when the previous is finished."""

    def __init__(self, previous: Ticket | None) -> None:
        """Create the ticket after ``previous``, which is None for the first."""
        self._previous = previous
        self._finished = threading.Event()

    def wait(self) -> None:
        """Block the thread until the previous ticket is finished.

        This cannot deadlock: the previous item was taken earlier, so another thread is
        already working on it, and finishes its ticket in any case.
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
        """Use one thread for each function.

        Calls of one function do not overlap, so the function may own buffers.
        """
        self._workers = workers
        self._taking = threading.Lock()
        self._last: Ticket | None = None

    async def run(self, items: Iterator[T]) -> None:
        """Process all items, and raise the exception of a worker.

        After an exception in one thread, or a cancellation, each other thread finishes the
        item that it has taken and takes no further one.
        """
        for first in items:
            # No thread is started unless there is an item, because large disks have long
            # ranges without work.  The threads take all items, so this block runs only once.
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
                # A worker that raises has not finished its ticket, and the workers of later
                # items would wait for it forever.
                ticket.finish()
