"""Whether other work waits for the event loop besides the task that runs now.

A task that polls, or that makes a system call inline, keeps all other tasks from running.
Before a task polls or makes such a call, it asks the `LoopLoad` whether other work waits.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class LoopLoad:
    """Knows what work waits for the event loop of one process.

    Attributes:
        polled_reads: How many reads of host files are being retried now.  While this is not
            0, no task should keep the event loop busy for long.
    """

    def __init__(self) -> None:
        """Start without any load."""
        self.polled_reads = 0
        self._sources: list[Callable[[], bool]] = []
        self._threads = trio.lowlevel.RunVar[trio.CapacityLimiter]("threads")

    def has_threads(self) -> bool:
        """Return whether a worker thread is running.

        If so, no task may poll, and the event loop must sleep: a task that polls does not
        notice that the thread has finished, and a busy loop starves the thread of the GIL.
        """
        try:
            threads = self._threads.get()
        except LookupError:
            threads = trio.to_thread.current_default_thread_limiter()
            self._threads.set(threads)
        return threads.borrowed_tokens > 0

    def has_requests(self) -> bool:
        """Return whether any source has a request that no task has taken yet."""
        return any(has_request() for has_request in self._sources)

    @contextmanager
    def request_source(self, has_request: Callable[[], bool]) -> Iterator[None]:
        """Add a source of requests to `has_requests` inside the ``with`` block.

        ``has_request`` returns whether the source has a request that no task has taken yet.
        """
        self._sources.append(has_request)
        try:
            yield
        finally:
            self._sources.remove(has_request)


loop_load: Final = LoopLoad()
"""The load of this process: a process runs one event loop that serves requests."""
