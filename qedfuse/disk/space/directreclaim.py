"""Freeing clusters on behalf of a request that needs some; Linux calls this "direct reclaim".

Clusters that have lost their reference are in quarantine, until `Reclaim` frees them at the end of
a flush.  A request that needs clusters earlier waits for a write-back of the tables, and then calls
`Reclaim.run` itself:

- before the file grows, if enough clusters are in quarantine to be worth the write-back;
- before the file would exceed its bound, if any clusters are in quarantine.
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
"""A write-back before the file grows is worthwhile if more bytes are in quarantine than a limit:
the length of the file divided by ``_WORTH_DIVISOR``, but at least the minimum, and at most the
maximum."""


class DirectReclaim:
    """Frees clusters for a request, so that the file need not grow or exceed its bound."""

    def __init__(
        self,
        allocator: Allocator,
        quarantine: Quarantine,
        writeback: MetadataWriteback,
        reclaim: Reclaim,
        flusher: Flusher,
        scan: Scan,
    ) -> None:
        """Prepare to free clusters that are in ``quarantine``, or that ``scan`` finds."""
        self._allocator = allocator
        self._bits = allocator.cluster_bits
        self._quarantine = quarantine
        self._writeback = writeback
        self._reclaim = reclaim
        self._flusher = flusher
        self._scan = scan

    @property
    def _worth_bytes(self) -> int:
        """The number of bytes in quarantine above which a write-back is worthwhile."""
        share = self._allocator.end // _WORTH_DIVISOR
        return max(_MIN_WORTH_BYTES, min(_MAX_WORTH_BYTES, share))

    def should_reclaim(self) -> bool:
        """Return whether `reclaim_before_growth` is worth waiting for.

        True while holes are punched for free clusters, because the allocator gets them back soon.
        Also True if the scan has succeeded and enough clusters are in quarantine.
        """
        if self._reclaim.punching_clusters:
            return True
        quarantined = self._quarantine.count << self._bits
        return self._allocator.scan_complete and quarantined > 0 and quarantined > self._worth_bytes

    async def reclaim_before_growth(self) -> None:
        """Free clusters so that the file need not grow, if `should_reclaim` returns True.

        Waits for the end of punching.  If enough clusters are in quarantine then, also waits for a
        write-back cycle, and frees the clusters that may be used again, perhaps none.  Punches
        nothing, because the freed clusters will be used immediately.

        Raises:
            HostError: The tables could not be written back.
            ReadOnlyError: The disk has become read-only.
        """
        if self._reclaim.punching_clusters:
            await self._reclaim.wait_idle()
        if not self.should_reclaim():
            return
        if self._quarantine.unsealed_count << self._bits > self._worth_bytes:
            await self._writeback.barrier()
        else:
            # The clusters that lost their reference after the last cycle began ("unsealed") are not
            # worth another cycle.  For the others the running cycle must have ended, if there is
            # one.  Clusters that requests still use are freed later.
            await self._writeback.wait_running()
        await self._reclaim.run(max_runs=0)

    async def wait_for_free_clusters(self) -> bool:
        """Wait until the scan, the punching or the quarantine may have made clusters free.

        The method may wait for all requests of an epoch (`Epochs`).  So the caller must have left
        its own epoch, or it would wait for itself.

        Returns:
            True if clusters may have become free, so that the caller should try again.  False if
            waiting longer frees nothing.

        Raises:
            HostError: The tables could not be written back.
            ReadOnlyError: The disk has become read-only.
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
        # This compares how many clusters were freed, not how many are free.  Even if other tasks
        # have taken all freed clusters, the caller should try again.
        return self._reclaim.freed_clusters != before
