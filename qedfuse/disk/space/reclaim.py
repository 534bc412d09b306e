"""Giving space back: clusters leave the quarantine, and the host gets what nothing uses.

Runs after each write-back cycle that a flush waited for.  Free clusters at the end of the
file are cut off, others are punched out of the host's file, so that they take up no space
while nothing uses them.
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
"""Most runs that are punched after one cycle, because a flush waits for them."""

_MAX_RUNS_PER_PUNCH: Final = 64
"""Most runs that go to a worker thread together."""

_MIN_SCATTERED_RUNS: Final = 64
"""From this many runs on, clusters go into quarantine as a list and not run by run."""


class Reclaim:
    """Decides when clusters that lost their reference are free.

    Attributes:
        freed_clusters: How many clusters have left the quarantine so far.
        punching_clusters: How many free clusters are being punched, and are therefore
            not handed out.
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
        """Move clusters from ``quarantine`` to ``allocator``; ``marking`` records drops."""
        self._file = file
        self._length = length
        self._allocator = allocator
        self._quarantine = quarantine
        self._writeback = writeback
        self._guard = guard
        self._marking = marking
        self._lock = trio.Lock()
        self._bits = allocator.cluster_bits
        self._host_refused = False
        self._punching = True
        self._untrusted_end = 0
        self.freed_clusters = 0
        self.punching_clusters = 0

    # Into quarantine

    def retire(self, offset: int, length: int, dropped_by: int) -> None:
        """Put a run into quarantine; ``dropped_by`` is the file offset of the slice.

        No await between changing the entries in the slice and this call: see
        `Quarantine.retire`.
        """
        first, count = offset >> self._bits, length >> self._bits
        self._quarantine.retire(first, count)
        self._marking.record_drop(first, count, dropped_by)

    def retire_all(self, offsets: NDArray[np.uint64], dropped_by: int) -> None:
        """Put clusters into quarantine, as `retire` does for one run.

        ``offsets`` are their file offsets, in the order of their entries.
        """
        if not len(offsets):
            return
        starts = np.flatnonzero(offsets[1:] - offsets[:-1] != 1 << self._bits) + 1
        if len(starts) >= _MIN_SCATTERED_RUNS and not self._marking.active:
            self._quarantine.retire_many(offsets >> np.uint64(self._bits))
            return
        for first, last in pairwise([0, *starts.tolist(), len(offsets)]):
            self.retire(int(offsets[first]), (last - first) << self._bits, dropped_by)

    # What is left to do

    @property
    def pending(self) -> bool:
        """Whether `run` has something to do, now or after a further cycle."""
        allocator = self._allocator
        if not allocator.scan_complete:
            return False
        unpunched = self._can_punch and allocator.unpunched.count + allocator.maybe_holes.count > 0
        return self._quarantine.count > 0 or allocator.tail_is_free or unpunched

    @property
    def pending_clusters(self) -> int:
        """How many clusters are known that have still to be given back."""
        allocator = self._allocator
        return self._quarantine.count + (allocator.unpunched.count if self._can_punch else 0)

    @property
    def _can_punch(self) -> bool:
        return self._punching and self._file.can_punch

    @contextmanager
    def punching_suspended(self) -> Iterator[None]:
        """Punch nothing inside the ``with`` block, which is not entered twice."""
        self._punching = False
        try:
            yield
        finally:
            self._punching = True

    def distrust_below(self, end: int) -> None:
        """Never use again what loses its reference below the file offset ``end``.

        For an image in which another entry may refer to it as well.
        """
        self._untrusted_end = end

    @property
    def has_untrusted(self) -> bool:
        """Whether there are clusters that are not used again: see `distrust_below`."""
        return self._untrusted_end > 0

    def wake_if_pending(self) -> None:
        """Wake the background task if there is something to give back."""
        if self.pending:
            self._writeback.wake()

    async def wait_idle(self) -> None:
        """Return when no `run` is under way that began before the call."""
        async with self._lock:
            pass

    # Out of quarantine, and back to the host

    async def run(self, punches: int | None = MAX_RUNS_PER_FLUSH) -> None:
        """Free what may be freed now; punch up to ``punches`` runs, all if it is None.

        If the host refuses, that costs space and nothing else: it is logged once.
        """
        # Before the scan has ended, a cluster that lost one reference may have another.
        if not self._allocator.scan_complete:
            return
        async with self._lock:
            while (reusable := self._quarantine.pop_reusable()) is not None:
                block, bits = reusable
                bits &= self._trusted_bits(block)
                self._allocator.give_back_block(block, bits)
                self.freed_clusters += bits.bit_count()
                await trio.lowlevel.checkpoint()
            try:
                self._allocator.lower_end()
                if self._allocator.tail_is_free:
                    await self._guard.prepare_write()
                    if await self._length.truncate_tail():
                        self._writeback.note_write()
                await self._punch(punches)
            except HostError as error:
                if not self._host_refused:
                    self._host_refused = True
                    log.warning("%s (while giving space back to the host)", error)

    def _trusted_bits(self, block: int) -> int:
        """Return a mask of the clusters in a block of the map that may be used again."""
        untrusted = (
            (self._untrusted_end >> self._bits)
            + self._allocator.free.shift
            - block * BLOCK_CLUSTERS
        )
        return -1 << max(0, untrusted)

    async def _punch(self, punches: int | None) -> None:
        """Punch free clusters out of the host's file, the lowest first."""
        left = punches
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
        """Punch up to ``max_runs`` runs of a map; return how many were removed from it."""
        allocator, bits = self._allocator, self._bits
        found = (clusters.take(BLOCK_CLUSTERS) for _ in range(max_runs))
        taken = [run for run in found if run is not None]
        # These must not be handed out while the host is about to wipe them.
        for first, count in taken:
            allocator.free.remove(first, count)
        self.punching_clusters = sum(count for _, count in taken)
        ranges = [(first << bits, count << bits) for first, count in taken]
        try:
            if clusters is allocator.maybe_holes:
                # The host is not asked about other clusters: space that was reserved and
                # never written to looks like a hole.
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
