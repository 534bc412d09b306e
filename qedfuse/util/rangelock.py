"""A lock over ranges of numbers: who overlaps waits, who does not goes on at once."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@dataclass(eq=False, slots=True)
class _Claim:
    """One task's range, in the queue from the moment it asks until it lets go."""

    start: int
    end: int
    blockers: int = 0
    ready: trio.Event | None = None


class RangeLock:
    """Exclusive ownership of half-open ranges ``[start, end)``, first come first served.

    A claim waits for every overlapping claim that came before it, held or waiting, so
    that nobody starves.  An uncontended claim does not yield to the event loop.
    """

    def __init__(self) -> None:
        """Make a lock that nobody holds."""
        self._claims: list[_Claim] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Own ``[start, end)`` inside the ``async with`` block."""
        claim = _Claim(start, end)
        claim.blockers = sum(start < other.end and other.start < end for other in self._claims)
        self._claims.append(claim)
        try:
            if claim.blockers:
                claim.ready = trio.Event()
                await claim.ready.wait()
            yield
        finally:
            self._drop(claim)

    def is_free(self, start: int, end: int) -> bool:
        """Tell whether nobody owns any of ``[start, end)`` or waits for it."""
        return not any(start < other.end and other.start < end for other in self._claims)

    def _drop(self, claim: _Claim) -> None:
        """Take a claim out and wake those who waited for nobody else."""
        place = self._claims.index(claim)
        del self._claims[place]
        for later in self._claims[place:]:
            if claim.start < later.end and later.start < claim.end:
                later.blockers -= 1
                if not later.blockers and later.ready is not None:
                    later.ready.set()

    @property
    def held(self) -> int:
        """How many ranges are held."""
        return len(self._claims) - self.waiting

    @property
    def waiting(self) -> int:
        """How many tasks wait for a range."""
        return sum(claim.blockers > 0 for claim in self._claims)
