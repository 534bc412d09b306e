"""Whether other work waits for the event loop besides the task that runs now.

A task that polls, or makes a long system call in the event loop's own thread, keeps all other tasks
from running.  Before that, it asks the `LoopLoad` whether other work waits.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _no_request() -> bool:
    """Return False, the answer of `LoopLoad.has_requests` outside any `LoopLoad.request_source`."""
    return False


class LoopLoad:
    """Knows what other work waits for one event loop; see `loop_load`.

    Attributes:
        polled_reads: How many reads of host files are retried now until the page cache has the
            data.  The tasks that retry them need the event loop.
        fetched_reads: How many reads wait for a thread that needs the GIL and is not a thread of
            trio, such as a thread that asks a server.
    """

    def __init__(self, threads: trio.CapacityLimiter) -> None:
        """Start without any load; ``threads`` limits the worker threads of the event loop."""
        self.polled_reads = 0
        self.fetched_reads = 0
        self._has_request: Callable[[], bool] = _no_request
        self._threads = threads

    def has_running_threads(self) -> bool:
        """Return whether a thread of trio is running, or `fetched_reads` is more than 0.

        If True, the caller must not poll.  While a task polls, the event loop does not notice that
        a thread has finished.  And an event loop that never sleeps starves the thread of the GIL.
        """
        return self._threads.borrowed_tokens > 0 or self.fetched_reads > 0

    def has_requests(self) -> bool:
        """Return whether a `request_source` has a request that no task has taken yet."""
        return self._has_request()

    @contextmanager
    def request_source(self, has_request: Callable[[], bool]) -> Iterator[None]:
        """Make `has_requests` ask a source of requests inside the ``with`` block."""
        before, self._has_request = self._has_request, has_request
        try:
            yield
        finally:
            self._has_request = before


_load: Final = trio.lowlevel.RunVar[LoopLoad]("load")


def loop_load() -> LoopLoad:
    """Return the load of the event loop that runs in this thread.

    Each event loop has a load of its own, because several can run in one process.  Code that needs
    the load for every request should keep the object, because finding it takes time.

    Raises:
        RuntimeError: No event loop runs in this thread.
    """
    try:
        return _load.get()
    except LookupError:
        load = LoopLoad(trio.to_thread.current_default_thread_limiter())
        _load.set(load)
        return load
