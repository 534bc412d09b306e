"""Single flight: concurrent callers that want the same value share one fetch of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

K = TypeVar("K", bound="Hashable")


class SingleFlight(Generic[K]):
    """Runs at most one fetch per key at a time.

    The fetch must store its result in a cache, where the callers must look again when `run`
    returns.  If the fetch has failed or was cancelled, a caller that finds no result there
    calls `run` again, so no caller gets the error of another caller's fetch.
    """

    def __init__(self) -> None:
        """Start with no fetch running."""
        self._flights: dict[K, trio.Event] = {}

    async def run(self, key: K, fetch: Callable[[], Awaitable[None]]) -> bool:
        """Run ``fetch`` for ``key``, or wait until the running fetch for it has ended.

        Returns:
            Whether this call ran ``fetch``.  If not, the fetch of the other call may have
            stored a result or failed.
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
