"""Single flight: concurrent callers that want the same value share one fetch of this value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

K = TypeVar("K", bound="Hashable")


class SingleFlight(Generic[K]):
    """Runs at most one fetch per key at a time.

    The fetch must store its result in a cache, and the callers must look there when `run`
    returns.  A caller that has only waited may find no result there: the other caller's fetch
    may have failed or been cancelled, or the cache may have evicted the result since.  Such a
    caller must call `run` again.  So no caller gets the error of another caller's fetch.
    """

    def __init__(self) -> None:
        """Start with no fetch running."""
        self._flights: dict[K, trio.Event] = {}

    async def run(self, key: K, fetch: Callable[[], Awaitable[None]]) -> bool:
        """Run ``fetch``, or wait until the fetch that is running for ``key`` has ended.

        Returns:
            True if this call has run ``fetch``.  False if it has waited for the fetch of
            another call, which may have stored a result or failed.

        Raises:
            BaseException: The error of ``fetch``, only if this call has run ``fetch``.
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
