"""Single flight: concurrent callers that want the same value share one fetch of this value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

from qedfuse.errors import ForeignError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

K = TypeVar("K", bound="Hashable")

_SHARED_ERRORS: Final = (RemoteError, ForeignError)
"""Errors of a server or of QEMU, which are raised in every caller that waits for the fetch.

A fetch that fails with such an error has usually taken long, and a further one would take as long.
"""


class _Flight:
    """A fetch that is running or has ended.

    Attributes:
        ended: Set when the fetch has ended.
        error: The error of `_SHARED_ERRORS` with which the fetch has ended, or None.
    """

    def __init__(self) -> None:
        """Start with a fetch that is running."""
        self.ended = trio.Event()
        self.error: RemoteError | ForeignError | None = None


class SingleFlight(Generic[K]):
    """Runs at most one fetch per key at a time.

    The fetch must store its result in a cache, and the callers must look there when `run` returns.
    A caller that has only waited may find no result: the fetch may have failed or been cancelled,
    or the cache may have evicted the result since.  Then the caller must call `run` again.

    Most errors of a fetch are raised only in the caller that has run it.  An error of a server or
    of QEMU (`_SHARED_ERRORS`) is also raised in the callers that have waited, which would otherwise
    wait for the failed server one after another.
    """

    def __init__(self) -> None:
        """Start with no fetch running."""
        self._flights: dict[K, _Flight] = {}

    async def run(self, key: K, fetch: Callable[[], Awaitable[None]]) -> bool:
        """Run ``fetch``, or wait until the fetch that is running for ``key`` has ended.

        Returns:
            True if this call has run ``fetch``; False if it has waited for another fetch, which may
            have failed.

        Raises:
            RemoteError: The server has failed, during ``fetch`` or the fetch that was waited for.
            ForeignError: The process that reads a foreign image has failed, likewise.
            BaseException: Any other error of ``fetch``, only if this call has run it.
        """
        flight = self._flights.get(key)
        if flight is not None:
            await flight.ended.wait()
            if flight.error is not None:
                raise flight.error.again()
            return False
        flight = self._flights[key] = _Flight()
        try:
            await fetch()
        except _SHARED_ERRORS as error:
            flight.error = error.again()
            raise
        finally:
            del self._flights[key]
            flight.ended.set()
        return True
