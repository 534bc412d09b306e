"""Freeing clusters on behalf of a request that needs some: "direct reclaim" in Linux.

`Reclaim` frees clusters after each flush.  A request that needs clusters before the next
flush runs one itself: if so much is in quarantine that it is worth a flush, before the
file grows; and in any case before the file would exceed its bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.quarantine import Quarantine
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.space.scan import Scan
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_WORTH_DIVISOR: Final = 16
_MIN_WORTH_BYTES: Final = 1 << 20
_MAX_WORTH_BYTES: Final = 1 << 26
"""How much in quarantine is worth a flush before the file grows: the length of the file
divided by ``_WORTH_DIVISOR``, within these limits."""


class DirectReclaim:
    """Frees clusters where the file would otherwise grow."""

    def __init__(
        self,
        allocator: Allocator,
        quarantine: Quarantine,
        writeback: MetadataWriteback,
        reclaim: Reclaim,
        flusher: Flusher,
        scan: Scan,
    ) -> None:
        """Free clusters that are in ``quarantine``, or that ``scan`` finds."""
        self._allocator = allocator
        self._bits = allocator.cluster_bits
        self._quarantine = quarantine
        self._writeback = writeback
        self._reclaim = reclaim
        self._flusher = flusher
        self._scan = scan

    @property
    def _worth_bytes(self) -> int:
        """How many bytes in quarantine are worth a flush."""
        share = self._allocator.end // _WORTH_DIVISOR
        return max(_MIN_WORTH_BYTES, min(_MAX_WORTH_BYTES, share))

    def should_reclaim(self) -> bool:
        """Return whether clusters can be freed that are worth waiting for."""
        if self._reclaim.punching_clusters:
            return True
        quarantined = self._quarantine.count << self._bits
        return self._allocator.scan_complete and quarantined > 0 and quarantined > self._worth_bytes

    async def reclaim_before_growth(self) -> None:
        """Flush before the file grows, if enough clusters are in quarantine to be worth it.

        Does not wait for the requests that the quarantine waits for, and punches nothing:
        the clusters are about to be used.

        Raises:
            HostError: The tables could not be written back.
        """
        if self._reclaim.punching_clusters:
            await self._reclaim.wait_idle()
        if not self.should_reclaim():
            return
        if self._quarantine.unsealed << self._bits > self._worth_bytes:
            await self._writeback.barrier()
        else:
            # Most of the quarantine is sealed: a running cycle makes it durable, or an
            # earlier one has, and the requests that it waits for may have ended since.
            await self._writeback.wait_running()
        await self._reclaim.run(max_runs=0)

    async def wait_for_free_clusters(self) -> bool:
        """Wait for whatever may make clusters free: the scan, punching, or the quarantine.

        The caller must not be in an epoch: this waits until earlier epochs have drained, which
        may include the caller's (deadlock).

        Returns:
            Whether clusters may have become free; other tasks may have taken them.

        Raises:
            HostError: The tables could not be written back.
        """
        if not self._scan.finished.is_set():
            await self._scan.finished.wait()
            return True
        if self._reclaim.punching_clusters:
            await self._reclaim.wait_idle()
            return True
        if not self._allocator.scan_complete or not self._quarantine.count:
            return False
        before = self._reclaim.freed_clusters
        await self._flusher.flush()
        await self._quarantine.wait_drained()
        await self._reclaim.run()
        # Other tasks may have put more into quarantine meanwhile, or have taken what
        # became free.
        return self._reclaim.freed_clusters != before
