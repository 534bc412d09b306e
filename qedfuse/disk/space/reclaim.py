"""Reclaiming space: clusters leave the quarantine, and free space is returned to the host.

A cluster that lost its reference stays in the quarantine until it can be used again safely.
`Reclaim.run` frees clusters of the quarantine, cuts off free clusters at the end of the file, and
punches the others out of the host's file.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.space.freemap import BLOCK_CLUSTERS
from qedfuse.errors import HostError
from qedfuse.hostio.tablewalk import holds_data

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.filelength import FileLength
    from qedfuse.disk.space.freemap import FreeMap
    from qedfuse.disk.space.marking import Marking
    from qedfuse.disk.space.quarantine import Quarantine
    from qedfuse.disk.writeback.firstwrite import FirstWriteGuard
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile

log = logging.getLogger(__name__)

MAX_RUNS_PER_FLUSH: Final = 256
"""Maximum number of runs that one call of `Reclaim.run` punches by default."""

_MAX_RUNS_PER_PUNCH: Final = 64
"""Maximum number of runs that one job of a worker thread punches."""

_MAX_RUNS_RETIRED_SINGLY: Final = 64
"""If clusters form more runs than this, they go into quarantine as one list, not run by run.

While the scan marks clusters, all go run by run, because `Marking.record_drop` needs runs.
"""


class Reclaim:
    """Frees clusters that lost their reference, and returns free space to the host.

    Attributes:
        freed_clusters: How many clusters from the quarantine have become free since opening,
            without those that `distrust_below` excludes.
        punching_clusters: How many free clusters are being punched now.
        error: The first error of the host in `run`; None if there was none.
    """

    def __init__(
        self,
        file: HostFile,
        length: FileLength,
        allocator: Allocator,
        quarantine: Quarantine,
        writeback: MetadataWriteback,
        guard: FirstWriteGuard,
        marking: Marking,
    ) -> None:
        """Move clusters from ``quarantine`` to ``allocator``."""
        self._file = file
        self._length = length
        self._allocator = allocator
        self._quarantine = quarantine
        self._writeback = writeback
        self._guard = guard
        self._marking = marking
        self._lock = trio.Lock()
        self._bits = allocator.cluster_bits
        self.error: HostError | None = None
        self._punching_allowed = True
        self._untrusted_end = 0
        self.freed_clusters = 0
        self.punching_clusters = 0

    # Into quarantine

    def retire(self, offset: int, length: int, dropped_by: int) -> None:
        """Put a run of clusters into quarantine, after the references to it were removed.

        The caller must not await anything between removing the references and this call: see
        `Quarantine.retire`.

        Args:
            offset: File offset of the run.
            length: Length of the run in bytes.
            dropped_by: File offset of the slice that held the references.
        """
        first, count = offset >> self._bits, length >> self._bits
        self._quarantine.retire(first, count)
        self._marking.record_drop(first, count, dropped_by)

    def retire_all(self, offsets: NDArray[np.uint64], dropped_by: int) -> None:
        """Put clusters into quarantine, after their references were removed.

        The caller must not await anything between removing the references and this call.

        Args:
            offsets: File offset of each cluster, in the order of the entries that referred to the
                clusters.
            dropped_by: File offset of the slice that held the references.
        """
        if not len(offsets):
            return
        starts = np.flatnonzero(offsets[1:] - offsets[:-1] != 1 << self._bits) + 1
        if len(starts) >= _MAX_RUNS_RETIRED_SINGLY and not self._marking.active:
            self._quarantine.retire_many(offsets >> np.uint64(self._bits))
            return
        for first, last in pairwise([0, *starts.tolist(), len(offsets)]):
            self.retire(int(offsets[first]), (last - first) << self._bits, dropped_by)

    # Work that is left for `run`

    @property
    def pending(self) -> bool:
        """Whether there are clusters to free, cut off or punch.

        False until the scan for the clusters in use has ended, and also afterwards if it has
        failed.  Clusters in quarantine count even if `run` can free them only after the next
        write-back cycle.
        """
        allocator = self._allocator
        if not allocator.scan_complete:
            return False
        # Clusters in `unpunched` probably take up space; `maybe_holes` may be holes already.
        can_punch = self._can_punch and allocator.unpunched.count + allocator.maybe_holes.count > 0
        return self._quarantine.count > 0 or allocator.tail_is_free or can_punch

    @property
    def pending_clusters(self) -> int:
        """How many clusters are in quarantine, or are free but still take up space on the host.

        Clusters that may be holes (`Allocator.maybe_holes`) do not count.  If nothing can be
        punched now, only the clusters in quarantine count.
        """
        allocator = self._allocator
        return self._quarantine.count + (allocator.unpunched.count if self._can_punch else 0)

    @property
    def _can_punch(self) -> bool:
        """Whether the host can punch holes, and punching is not suspended."""
        return self._punching_allowed and self._file.can_punch

    @contextmanager
    def punching_suspended(self) -> Iterator[None]:
        """Make `run` punch nothing inside the ``with`` block.  The block must not be nested."""
        self._punching_allowed = False
        try:
            yield
        finally:
            self._punching_allowed = True

    def distrust_below(self, end: int) -> None:
        """Never free the clusters below the file offset ``end`` when they lose their reference.

        In a damaged image two entries may refer to one cluster.  When one of the entries is
        dropped, the cluster must stay unchanged for the other.
        """
        self._untrusted_end = end

    @property
    def has_untrusted(self) -> bool:
        """Whether `distrust_below` was called."""
        return self._untrusted_end > 0

    def wake_if_pending(self) -> None:
        """Wake the flusher's background task if `pending` is true."""
        if self.pending:
            self._writeback.wake()

    async def wait_idle(self) -> None:
        """Wait for the end of all calls of `run` that began before this call."""
        async with self._lock:
            pass

    # Out of quarantine, and returned to the host

    async def run(self, max_runs: int | None = MAX_RUNS_PER_FLUSH) -> None:
        """Free clusters of the quarantine, cut off the file's free end, and punch free clusters.

        Frees only clusters that need not stay in quarantine any longer.  Punches at most
        ``max_runs`` runs, or all if ``max_runs`` is None.  Does nothing before the scan has ended,
        or if it has failed.

        If the host refuses to cut or to punch, the file only takes up more space than necessary.
        So a HostError is not raised, and only the first one is logged.

        Raises:
            ReadOnlyError: Space could be returned to the host, but the disk has become read-only.
        """
        # Until the scan has ended, a cluster that lost one reference could have a second one.
        if not self._allocator.scan_complete:
            return
        async with self._lock:
            while (reusable := self._quarantine.pop_reusable()) is not None:
                block, bits = reusable
                bits &= self._trusted_bits(block)
                self._allocator.free_block(block, bits)
                self.freed_clusters += bits.bit_count()
                await trio.lowlevel.checkpoint()
            try:
                self._allocator.lower_end()
                if self._allocator.tail_is_free:
                    await self._guard.prepare_write()
                    if await self._length.truncate_tail():
                        self._writeback.note_write()
                await self._punch(max_runs)
            except HostError as error:
                if self.error is None:
                    self.error = error
                    log.warning("%s (while returning space to the host)", error)

    def _trusted_bits(self, block: int) -> int:
        """Return a bit mask of the clusters of a block that `run` is allowed to free."""
        untrusted = (
            (self._untrusted_end >> self._bits)
            + self._allocator.free.alignment
            - block * BLOCK_CLUSTERS
        )
        return -1 << max(0, untrusted)

    async def _punch(self, max_runs: int | None) -> None:
        """Punch at most ``max_runs`` runs of free clusters out of the file; all if it is None."""
        left = max_runs
        while self._can_punch and left != 0:
            runs = _MAX_RUNS_PER_PUNCH if left is None else min(left, _MAX_RUNS_PER_PUNCH)
            clusters = self._allocator.unpunched
            if clusters.count:
                done = await self._punch_some(clusters, runs)
            else:
                done = await self._punch_some(self._allocator.maybe_holes, runs)
            if not done:
                break
            left = None if left is None else left - done

    async def _punch_some(self, clusters: FreeMap, max_runs: int) -> int:
        """Take at most ``max_runs`` runs out of ``clusters`` and punch them; return their number.

        The number includes runs that were holes before.  After an error all runs are in
        ``clusters`` again.
        """
        allocator, bits = self._allocator, self._bits
        found = (clusters.take(BLOCK_CLUSTERS) for _ in range(max_runs))
        taken = [run for run in found if run is not None]
        # While the runs are punched, they are not in `Allocator.free`.  Otherwise the allocator
        # could hand out a cluster, and the punching would erase its new data.
        for first, count in taken:
            allocator.free.remove(first, count)
        self.punching_clusters = sum(count for _, count in taken)
        ranges = [(first << bits, count << bits) for first, count in taken]
        try:
            if clusters is allocator.maybe_holes:
                # Most clusters that the scan found to be free are holes already, so the host is
                # asked first.  It is not asked about `unpunched`: reserved space that was never
                # written looks like a hole.
                ranges = [run for run in ranges if await holds_data(self._file, *run)]
            if ranges:
                await self._guard.prepare_write()
                await self._file.punch(*ranges)
                self._writeback.note_write()
        except BaseException:
            for first, count in taken:
                clusters.add(first, count)
            raise
        finally:
            self.punching_clusters = 0
            for first, count in taken:
                allocator.free.add(first, count)
        return len(taken)
