"""Finding the free clusters of a file: those to which neither a table nor the header refers.

After an image was opened for writing, the scan walks once over all its L2 tables, in the
background, while requests change them; `Marking` describes why the result is correct nevertheless.

If the image has a valid free list, the scan is postponed until a table is about to change.  The
list does not replace the scan: in an untrusted image, a list with matching checksums can name a
cluster in use.  Such a cluster must not be handed out, cut off or punched, so the scan decides
which listed clusters are free.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.lookup.slices import L2
from qedfuse.disk.space.allocator import MAX_FREE_CLUSTERS
from qedfuse.disk.space.freemap import BLOCK_CLUSTERS
from qedfuse.disk.space.l2tables import claim_tables, holding_data
from qedfuse.errors import HostError, QedError
from qedfuse.hostio.regular import allocated_bytes
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.freemap import FreeMap
    from qedfuse.disk.space.marking import Marking
    from qedfuse.disk.space.reclaim import Reclaim

log = logging.getLogger(__name__)


_MAX_HOLE_QUERIES_CLUSTERS: Final = 1 << 18
"""Up to this number of free clusters, `Reclaim` asks the host which of them are holes.

With more free clusters, the queries would take seconds at each close.  So all of them are assumed
to be holes if the file takes up no more space than its used clusters.
"""

_SHORT_SCAN_BYTES: Final = 8 << 20
"""Maximum bytes of L2 tables whose scan a write may wait for."""


@dataclass(frozen=True, slots=True)
class ScanStatistics:
    """How far the scan is.

    Attributes:
        state: ``postponed``, ``waiting``, ``running``, ``complete`` (also after damage was found)
            or ``failed`` (a table could not be read, or too many clusters are in use).
        tables: Number of L2 tables to scan.
        scanned_tables: Number of those that the walk has passed or skipped as holes.
        loaded_slices: Number of slices of tables that the walk has loaded into memory.
    """

    state: str
    tables: int
    scanned_tables: int
    loaded_slices: int


class Scan:
    """The one scan of an open image.

    Attributes:
        end_at_begin: File offset of the end of the last whole cluster when `begin` was called.
        entries_validated: Whether the scan has read, and so validated, all entries that the tables
            had when `begin` was called, even if it has failed later for a lack of memory.
        finished: Set when the scan has ended, successfully or not.
        error: Why the scan has failed; None if it has not ended, or has succeeded.
    """

    def __init__(
        self, layer: QedLayer, allocator: Allocator, reclaim: Reclaim, marking: Marking
    ) -> None:
        """Prepare to scan the image of ``layer``.

        The caller must call `begin` before the first change of the image, and then `run` or
        `run_when_due`.
        """
        self._layer = layer
        self._allocator = allocator
        self._reclaim = reclaim
        self._marking = marking
        self._tables: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.end_at_begin = 0
        self.entries_validated = False
        self._has_bad_entries = False
        self._scanned_tables = self._loaded_slices = 0
        self._lock = trio.Lock()
        self._due = trio.Event()
        self._due.set()
        self._listed = self._list_clusters = allocator.free.empty_like()
        self.finished = trio.Event()
        self.error: QedError | None = None

    def begin(self) -> None:
        """Note which tables the image has and where its file ends; start recording its changes."""
        self._tables = self._layer.l2_tables
        self._has_bad_entries = self._layer.damaged
        self.end_at_begin = self._allocator.end
        self._marking.begin(self.end_at_begin >> self._allocator.cluster_bits)

    def postpone(self, listed: FreeMap, list_clusters: FreeMap) -> None:
        """Postpone the scan until `before_table_change` or `run` is called.

        Args:
            listed: The clusters that the free list names.
            list_clusters: Those of them that hold the list itself.  The others are assumed to be
                holes of the host's file.
        """
        self._listed, self._list_clusters = listed, list_clusters
        self._due = trio.Event()

    @property
    def is_short(self) -> bool:
        """Whether the scan is short enough for a write to wait."""
        return len(self._layer.l2_tables) * self._layer.geometry.table_bytes <= _SHORT_SCAN_BYTES

    @property
    def is_postponed(self) -> bool:
        """Whether the scan is postponed and not yet due."""
        return not self._due.is_set()

    def statistics(self) -> ScanStatistics:
        """Return how far the scan is."""
        if self.finished.is_set():
            state = "complete" if self._allocator.scan_complete else "failed"
        elif self.is_postponed:
            state = "postponed"
        else:
            # `run` holds the lock until the scan has ended.
            state = "running" if self._lock.locked() else "waiting"
        return ScanStatistics(state, len(self._tables), self._scanned_tables, self._loaded_slices)

    async def before_table_change(self) -> None:
        """If the scan was postponed, start it, and wait for its end if it is short.

        A long scan continues in the background.  Until it ends, the file grows (within its bound)
        for new clusters.
        """
        if self._listed.count and not self.finished.is_set():
            self._due.set()
            if self.is_short:
                await self.run()

    async def run_when_due(self) -> None:
        """Wait until the scan is not postponed, then run it; a background task."""
        await self._due.wait()
        await self.run()

    async def run(self) -> None:
        """Return when the scan has ended: run it, or wait for the task that runs it.

        If the scan is cancelled, the next call starts it again from the first table.
        """
        self._due.set()
        async with self._lock:
            if not self.finished.is_set():
                await self._run()

    async def _run(self) -> None:
        """Walk the tables, and publish the result; log an error of the walk."""
        try:
            await self._walk()
        except QedError as error:
            # The disk works without a result: the file only grows.
            log.warning("%s (while looking for free space)", error)
            self.error = error
        else:
            await self._publish()
        self._marking.end()
        self.finished.set()
        self._reclaim.wake_if_pending()

    async def _walk(self) -> None:
        """Mark the clusters of the header and of all tables, and those to which entries refer."""
        layer, bits = self._layer, self._allocator.cluster_bits
        header, length = layer.header, layer.geometry.table_bytes
        self._marking.restart()
        owners = self._marking.owners
        owners.claim_range(0, header.header_end >> bits)
        owners.claim_range(header.l1_table_offset >> bits, header.l1_end >> bits)
        await claim_tables(owners, self._tables, layer.geometry)
        # Skip tables and slices that are holes of a sparse file: their entries are unallocated.
        with_data = await holding_data(layer.file, self._tables, length)
        remaining = self._tables[with_data].tolist()
        self._scanned_tables = len(self._tables) - len(remaining)
        for start in remaining:
            # Marking a slice takes half a millisecond; requests run between two slices.
            async for offset in DataSlices(layer.file, start, length):
                await self._mark_slice(start, (offset - start) // ENTRY_BYTES)
            self._scanned_tables += 1
        self.entries_validated = True
        self._marking.require_complete()

    async def _mark_slice(self, table: int, index: int) -> None:
        """Mark the clusters to which the slice with entry ``index`` of a table refers.

        The slice comes from the table cache.  So a reference that was dropped in memory, but is
        still in the file, is not marked.
        """
        tables = self._layer.tables
        cached = tables.cached(table, index)
        slice_ = cached or await tables.load(table, index, L2)
        self._loaded_slices += cached is None
        values = np.array(slice_.entries, np.uint64)
        valid = values > ZERO
        if slice_.bad is not None:
            self._has_bad_entries = True
            valid &= np.frombuffer(slice_.bad, np.uint8) == 0
        self._marking.mark(slice_.offset, values[valid] >> np.uint64(self._allocator.cluster_bits))
        if cached is None:
            tables.evict(slice_)

    async def _publish(self) -> None:
        """End the scan: give the allocator the free clusters, or distrust a damaged image."""
        if self._marking.duplicates or self._has_bad_entries:
            self._distrust()
            self._allocator.finish_scan()
        else:
            await self._adopt_free()
            free = self._allocator.free.count
            all_holes = free > _MAX_HOLE_QUERIES_CLUSTERS and self._is_sparse()
            self._allocator.finish_scan(all_holes=all_holes)
            log.debug("%s: free clusters: %d", self._layer.file.name, free)

    async def _adopt_free(self) -> None:
        """Give the allocator the clusters without an owner that have not changed since `begin`."""
        allocator, marking, bits = self._allocator, self._marking, self._allocator.cluster_bits
        last = marking.owners.clusters
        if allocator.end == self.end_at_begin:
            # The file has not grown since the scan began, so free clusters at its end can be cut.
            last = max(marking.owners.end(), marking.changed.end())
            allocator.shrink(last << bits)
        alignment = allocator.free.alignment
        listed_in_use = 0
        for block in range(-(-(last + alignment) // BLOCK_CLUSTERS)):
            first = block * BLOCK_CLUSTERS - alignment
            # The end of the file may have been cut off during the last checkpoint.
            last = min(last, allocator.end >> bits)
            if first >= last:
                break
            inside = (1 << min(BLOCK_CLUSTERS, last - first)) - 1
            # The lowest `alignment` bits of block 0 stand for no cluster: see `FreeMap.alignment`.
            if not block:
                inside &= -1 << alignment
            # No await from here to `adopt_block`: a cluster that was handed out in between would
            # be adopted as free.  After `adopt_block` the clusters are in `Allocator.free`, from
            # which the allocator removes each cluster that it hands out.
            owned, listed = marking.owners.owned(first, BLOCK_CLUSTERS), self._listed.bits(block)
            unchanged = ~marking.changed.bits(block)
            found = inside & ~owned & unchanged
            if found:
                allocator.adopt_block(block, found, listed & ~self._list_clusters.bits(block))
            listed_in_use += (listed & owned & unchanged).bit_count()
            if allocator.free.count >= MAX_FREE_CLUSTERS:
                break
            await trio.lowlevel.checkpoint()
        if listed_in_use:
            log.error(
                "%s: free list: found %d clusters listed as free to which table entries refer, "
                "expected none: the list is dropped, and the tables decide",
                self._layer.file.name,
                listed_in_use,
            )

    def _distrust(self) -> None:
        """Mark the image as damaged, and never free a cluster that it had at opening.

        A cluster that seems to be free may belong to a damaged entry, so a repair may need it.
        """
        self._reclaim.distrust_below(self.end_at_begin)
        what = "invalid table entries"
        if self._marking.duplicates:
            what = f"{self._marking.duplicates} references to clusters that have another owner"
        self._layer.mark_damaged()
        log.error(
            "%s: found %s, expected none: the image must be repaired; until then no cluster "
            "that its file had at opening is used again",
            self._layer.file.name,
            what,
        )

    def _is_sparse(self) -> bool:
        """Return whether the file surely takes up no more space than its used clusters."""
        allocator = self._allocator
        used = (allocator.end >> allocator.cluster_bits) - allocator.free.count
        try:
            status = self._layer.file.stat()
        except HostError as error:
            # The free clusters are adopted already, so the scan must not end without a result.
            log.warning("%s (while looking for holes)", error)
            return False
        return allocated_bytes(status) <= used << allocator.cluster_bits
