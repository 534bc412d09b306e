"""One call for many askers: whoever wants what is already being fetched waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

K = TypeVar("K", bound="Hashable")


class SingleFlight(Generic[K]):
    """Runs at most one fetch per key at a time.

    The fetch leaves its result where askers look for it (a cache), so they look again
    after waiting.  An asker whose leader failed or was cancelled becomes the leader
    itself, so that nobody gets another's error.
    """

    def __init__(self) -> None:
        """Make one with nothing in flight."""
        self._flights: dict[K, trio.Event] = {}

    async def run(self, key: K, fetch: Callable[[], Awaitable[None]]) -> bool:
        """Run ``fetch`` for ``key``, or wait for the run under way.

        Returns:
            Whether this call ran ``fetch`` itself.  If not, look again: the result may
            be there, or the other run may have failed.
        """
        flight = self._flights.get(key)
        if flight is not None:
            await flight.wait()
            return False
        flight = self._flights[key] = trio.Event()
        try:
            await fetch()
        finally:
            del self._flights[key]
            flight.set()
        return True
