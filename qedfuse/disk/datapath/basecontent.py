"""The content of the bases for clusters that a write covers only in part.

When a server does not answer, the read for each such cluster fails after the time limit.  The
kernel sends a limited number of writes at a time, so without a further limit, closing a file with
many dirty pages would take the time limit again and again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import RemoteError

if TYPE_CHECKING:
    from qedfuse.disk.lookup.chain import Chain

_RECENT_SECONDS: Final = 1.0
"""For how many seconds a failure is remembered."""
_SHORT_SECONDS: Final = 1.0
"""Time limit of a read while a failure is remembered.  Data in a cache, or on a server that answers
again, arrives in this time."""


class BaseContent:
    """Reads the bases of a chain for writes."""

    def __init__(self, chain: Chain) -> None:
        """Read the bases of ``chain``."""
        self._chain = chain
        # The last failure and its time.
        self._failure: RemoteError | None = None
        self._failed_at = 0.0

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Return the bytes of the bases for a guest range.

        If a server has failed to give such bytes less than a second ago, the time limit of this
        read is one second.

        Raises:
            RemoteError: A server cannot be reached, refuses, or does not answer in time.
            HostError: A base cannot be read.
            CorruptImageError: A table entry of a base is not valid.
        """
        former = self._failure
        if former is not None and time.monotonic() - self._failed_at > _RECENT_SECONDS:
            former = None
        try:
            if former is None:
                return await self._chain.read(start, length, depth=1)
            with trio.move_on_after(_SHORT_SECONDS):
                return await self._chain.read(start, length, depth=1)
            failure = RemoteError(str(former), former.errno)
            failure.is_logged = former.is_logged
            raise failure
        except RemoteError as error:
            self._failure, self._failed_at = error, time.monotonic()
            raise
