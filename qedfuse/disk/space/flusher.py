"""A flush: one write-back cycle, then the space that it makes free is given back.

A module that needs nothing but durability uses `MetadataWriteback.barrier`, which is
allowed while holding any lock.  A flush takes the locks of `Reclaim` and below.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import QedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.writeback.metadata import MetadataWriteback

log = logging.getLogger(__name__)


def _ignore() -> None:
    """Do nothing at the end of a flush."""


class Flusher:
    """Flushes one disk, on request and periodically."""

    def __init__(self, writeback: MetadataWriteback, reclaim: Reclaim, period: float) -> None:
        """Flush at the latest ``period`` seconds after a change, while `run` runs."""
        self._writeback = writeback
        self._reclaim = reclaim
        self._period = period
        self._listener: Callable[[], None] = _ignore

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at the end of each flush, in place of an earlier listener."""
        self._listener = listener

    async def flush(self) -> None:
        """Return when everything written before the call is durable (D1).

        Then clusters that had lost their reference are free, and space is given back to
        the host (S3).

        Raises:
            HostError: As `MetadataWriteback.write_back`.
        """
        await self._writeback.write_back()
        # A disk that was not changed stays untouched: leaks can wait for a change.
        if self._writeback.cycles and self._reclaim.pending:
            await self._reclaim.run()
        self._listener()

    async def run(self) -> None:
        """Flush some seconds after each change; a background task (D4).

        Ends only when the disk has become read-only.  Each error is logged once, until a
        flush succeeds.
        """
        logged = ""
        while True:
            await self._writeback.wait_for_activity()
            await trio.sleep(self._period)
            try:
                await self.flush()
                logged = ""
                if self._reclaim.pending:
                    self._writeback.wake()
            except QedError as error:
                # The next caller that waits for a flush gets the error as well (D7).
                if str(error) != logged:
                    logged = str(error)
                    log.error("%s (while writing back tables)", error)  # noqa: TRY400
                if self._writeback.failure is not None:
                    return
                self._writeback.wake()
