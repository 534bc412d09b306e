"""A pool of worker threads that take item after item from one iterator.

Each thread keeps taking items until none is left, because switching from the event loop to a
thread and back can cost more than the work on one item.  A *worker* is the function that a thread
calls with each of its items.  With the item it gets a *ticket*, for work that must be done in the
order of the items.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from qedfuse.util.backgroundtasks import background_tasks
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")


class Ticket:
    """The position of an item in the order of the items.

    The turn of a ticket begins when the previous ticket is finished.  If a worker raises before the
    turn of its ticket, the ticket is finished early.  Then the turn of the next ticket can begin
    while tickets before the failed one are not finished.
    """

    def __init__(self, previous: Ticket | None) -> None:
        """Create the ticket that follows ``previous``; None for the first ticket."""
        self._previous = previous
        self._finished = threading.Event()

    def wait(self) -> None:
        """Block the thread until the previous ticket is finished.

        There is no deadlock: a thread has already taken the previous item, and finishes its ticket
        even if the worker raises.
        """
        if self._previous is not None:
            self._previous._finished.wait()  # noqa: SLF001  the same class
            self._previous = None

    def finish(self) -> None:
        """Finish the ticket; the turn of the next ticket begins.  A second call does nothing."""
        self._previous = None
        self._finished.set()


class WorkerPool(Generic[T]):
    """A few threads, each of which calls its own function with one item after another."""

    def __init__(self, workers: Sequence[Callable[[T, Ticket], None]]) -> None:
        """Use one thread for each function in ``workers``.

        Calls of the same function do not overlap, so the function may own buffers.
        """
        self._workers = workers
        self._taking = threading.Lock()
        self._last: Ticket | None = None

    async def run(self, items: Iterator[T]) -> None:
        """Call one of the workers with each item.

        After an exception or a cancellation, each thread finishes the item that it has taken and
        takes no further item.  If several workers raise, `background_tasks` says what is raised.
        """
        for first in items:
            # This block runs at most once, because the threads take all items after the first one.
            # Without an item no thread is started, which saves time for parts of a disk without
            # items.
            remaining = chain((first,), items)
            async with background_tasks() as nursery:
                for worker in self._workers:
                    nursery.start_soon(run_in_thread, self._serve, worker, remaining)

    def _serve(self, worker: Callable[[T, Ticket], None], items: Iterator[T]) -> None:
        """Take items and call ``worker`` with each until none is left; runs in a thread."""
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
                # A worker that raised may not have finished its ticket, so later ones would wait.
                ticket.finish()
