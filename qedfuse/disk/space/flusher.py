"""A flush: one write-back cycle, and then `Reclaim.run` for the clusters that the cycle frees.

The caller of a flush must not hold a lock of `Reclaim`, `FileLength`, `FirstWriteGuard` or
`HeaderStore`, because the flush takes these locks.  A caller that holds one can only make the file
durable, with `MetadataWriteback.barrier`.  The rules D1, D4 and D7 are in docs/durability.md, and
S3 is in docs/space.md.
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
    """Do nothing: the listener until `Flusher.listen` sets another."""


class Flusher:
    """Flushes one disk, on request and periodically."""

    def __init__(self, writeback: MetadataWriteback, reclaim: Reclaim, period: float) -> None:
        """Prepare flushes; `run` starts a flush ``period`` seconds after a change."""
        self._writeback = writeback
        self._reclaim = reclaim
        self._period = period
        self._listener: Callable[[], None] = _ignore

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at the end of each successful flush, instead of an earlier listener."""
        self._listener = listener

    def try_flush(self) -> bool:
        """Flush without waiting; return whether that succeeded.

        After False the caller must use `flush`.
        """
        if not self._writeback.try_write_back() or (
            self._writeback.cycles and self._reclaim.pending
        ):
            return False
        self._listener()
        return True

    async def flush(self) -> None:
        """Make everything durable that was written before the call, and reclaim space (D1, S3).

        Space is reclaimed as far as that is possible now.

        Raises:
            HostError: The host refused to make the writes durable; see
                `MetadataWriteback.write_back`.
            ReadOnlyError: The disk has become read-only during the call.
        """
        await self._writeback.write_back()
        # Without a write since the opening there was no cycle, and the image must not be changed.
        if self._writeback.cycles and self._reclaim.pending:
            await self._reclaim.run()
        self._listener()

    async def run(self) -> None:
        """Flush ``period`` seconds after a change, again and again; a background task (D4).

        Returns only when the disk has become read-only.
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
                # After a failed write the next flush tries again.  After a failed datasync each
                # later flush fails (D7).
                if str(error) != logged:
                    logged = str(error)
                    log.error("%s (while writing back tables)", error)  # noqa: TRY400
                if self._writeback.failure is not None:
                    return
                self._writeback.wake()
