"""A lock over ranges of numbers: only overlapping ranges exclude each other."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass(eq=False, slots=True)
class _Request:
    """One task's range, in the queue until the range is released.

    Attributes:
        start: The first number of the range.
        end: The number after the last one of the range.
        blockers: How many earlier requests overlap this one and have not been released.
        ready: Set when there are no blockers any more; None if the task need not wait.
    """

    start: int
    end: int
    blockers: int = 0
    ready: trio.Event | None = None


class RangeLock:
    """Exclusive ownership of half-open ranges ``[start, end)``, first come first served.

    A request waits for every earlier request that overlaps it, held or waiting, so no task starves.
    A request that need not wait makes no checkpoint.
    """

    def __init__(self) -> None:
        """Start with no range held."""
        self._requests: list[_Request] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Wait until ``[start, end)`` is free, and hold it inside the ``async with`` block."""
        if start >= end:
            yield
            return
        request = _Request(start, end)
        request.blockers = sum(start < other.end and other.start < end for other in self._requests)
        self._requests.append(request)
        try:
            if request.blockers:
                request.ready = trio.Event()
                await request.ready.wait()
            yield
        finally:
            self._drop(request)

    def is_free(self, start: int, end: int) -> bool:
        """Return whether ``[start, end)`` overlaps no range that a task holds or waits for."""
        return start >= end or not any(
            start < other.end and other.start < end for other in self._requests
        )

    def _drop(self, request: _Request) -> None:
        """Remove a request, and wake the tasks that were waiting only for this request."""
        position = self._requests.index(request)
        del self._requests[position]
        for later in self._requests[position:]:
            if request.start < later.end and later.start < request.end:
                later.blockers -= 1
                if not later.blockers and later.ready is not None:
                    later.ready.set()

    @property
    def held(self) -> int:
        """How many ranges are held."""
        return len(self._requests) - self.waiting

    @property
    def waiting(self) -> int:
        """How many tasks wait for a range."""
        return sum(request.blockers > 0 for request in self._requests)
