"""Placement: which clusters of the file are free, and which are handed out next.

Free clusters are handed out before the file grows.  The file never needs to be longer than its
*bound*: the length of the header, the L1 table, as many L2 tables as the size of the disk requires,
and one cluster for each cluster of the disk.

A table needs neighbouring clusters.  After a crash that loses a new table, its clusters are free,
and data could take some of them before the table is made again.  So each such crash could make the
file grow, even past its bound.  Therefore data must leave enough *table slots* (runs of free
clusters as long as a table: `FreeMap`) for all missing tables (proof in docs/space.md):

    slots in free runs + slots between the end and the bound >= tables still missing

Nothing in this module waits or calls the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.space.freemap import BLOCK_CLUSTERS, FreeMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.space.marking import Marking
    from qedfuse.ondisk.header import Header

MAX_FREE_CLUSTERS: Final = 1 << 28
"""The scan of the tables for free clusters adds no more once it has found this number: 16 TiB in
clusters of 64 KiB."""


class Run(NamedTuple):
    """Neighbouring clusters of the file.

    Attributes:
        offset: File offset of the first byte.
        length: Length in bytes.
        never_written: Whether the clusters read as zeros, because they are new in the file.
    """

    offset: int
    length: int
    never_written: bool

    @property
    def end(self) -> int:
        """The file offset just past the run."""
        return self.offset + self.length


class Allocator:
    """Chooses clusters: free ones first, then new ones at the end.

    `choose`, `choose_any` or `choose_table` selects clusters; `hand_out` then puts them into use.
    The caller must not await between the two steps.

    Attributes:
        cluster_bits: Shift between clusters and bytes.
        anchor: The first cluster past the L1 table, from which compaction packs the L2 tables.
        bound: File offset that `end` does not exceed, with few exceptions (docs/space.md).
        end: File offset from which on no cluster is in use or in `free`; new clusters begin here.
        free: Clusters below ``end`` that may be handed out.
        unpunched: Free clusters that `Reclaim` punches without asking the host.
        maybe_holes: Free clusters from the scan, for which `Reclaim` asks the host first whether
            they are holes already.
        tail_is_free: Whether free clusters at the end of the file wait to be cut off.
        handed_out: How many clusters have been handed out so far, for data and for tables.
        scan_complete: Whether the scan has passed all tables; before, few free clusters, or none,
            are known.
    """

    def __init__(
        self,
        header: Header,
        end: int,
        missing_tables: Callable[[], int],
        marking: Marking,
    ) -> None:
        """Prepare to allocate in a file; at first all of its clusters count as in use.

        Args:
            header: The header of the image.
            end: File offset of the end of the last whole cluster.
            missing_tables: Returns how many tables the disk may still need.
            marking: Records changes of clusters for the scan.
        """
        self._geometry = geometry = header.geometry
        self.cluster_bits = self._bits = geometry.cluster_bits
        self._missing_tables = missing_tables
        self._record_change = marking.record_change
        self.end = end
        # Clusters past both this offset and `end` read as zeros, because nothing has been written
        # to them since the file was opened or last cut.  (`FileLength.grow` first cuts off a part
        # of a cluster at the end of the file.)
        self._written_end = end
        self.anchor = header.l1_end >> self._bits
        self.free = FreeMap(geometry.table_size, self.anchor)
        self.unpunched = self.free.empty_like()
        self.maybe_holes = self.free.empty_like()
        self.scan_complete = False
        self.tail_is_free = False
        self.handed_out = 0
        self.set_size(header)

    def set_size(self, header: Header) -> None:
        """Compute `bound` for the disk size in ``header``."""
        self.bound = self._geometry.bound(header.header_end, header.image_size)

    # Choosing and handing out

    def choose(self, clusters: int) -> tuple[int, int] | None:
        """Choose a run of at most ``clusters`` clusters for data; leave slots for missing tables.

        Returns:
            The first cluster of the run and the number of clusters.  None if every cluster
            up to the bound is in use or needed for tables.
        """
        end, bound = self.end >> self._bits, self.bound >> self._bits
        spare = self._spare_slots(end)
        # Taking a run of ``clusters`` clusters costs at most this many slots.
        max_slots = clusters // self.free.table_clusters + clusters // BLOCK_CLUSTERS + 2
        limit = clusters if spare >= max_slots else 1
        if self.free.count:
            if spare > 0:
                return self.free.take(limit)
            cluster = self.free.take_outside_slots()
            if cluster is not None:
                return cluster, 1
        # Past `end` a slot begins at each cluster n for which n + `FreeMap.alignment` is a multiple
        # of the length of a table.  So the cluster at `end` costs a slot only if that is such an n.
        if end < bound and (spare > 0 or (end + self.free.alignment) % self.free.table_clusters):
            return end, min(limit, bound - end)
        # The clusters between the last slot and the bound are too few for a table, so data may use
        # them.  The skipped clusters before them become free, and stay reserved for tables.
        top = max(end, bound - (bound + self.free.alignment) % self.free.table_clusters)
        if top < bound:
            self._skip_to(top)
            return top, 1
        return None

    def choose_any(self) -> tuple[int, int]:
        """Choose one cluster for data after `choose` has found none, even past the bound.

        Returns:
            The number of the cluster, and 1.
        """
        return self.free.take(1) or (self.end >> self._bits, 1)

    def choose_table(self) -> int | None:
        """Choose the clusters of a new table.

        Returns:
            The first of the clusters; None if no run up to the bound is long enough.
        """
        found = self.free.take_slot()
        if found is not None:
            return found
        end, table = self.end >> self._bits, self.free.table_clusters
        # A table at the end of the file must not lie across the border of two blocks of `FreeMap`.
        # If a crash lost it, its clusters would not count as a slot there.
        if (end + self.free.alignment) % BLOCK_CLUSTERS > BLOCK_CLUSTERS - table:
            end += -(end + self.free.alignment) % BLOCK_CLUSTERS
        if end + table > self.bound >> self._bits:
            found = self.free.find_run(table)
            if found is not None:
                self.free.remove(found, table)
            return found
        self._skip_to(end)
        return end

    def _skip_to(self, cluster: int) -> None:
        """Raise `end` to a cluster if `end` is lower; the skipped clusters become free."""
        end = self.end >> self._bits
        if cluster > end:
            self.end = cluster << self._bits
            self.free_run(end, cluster - end)

    def _spare_slots(self, end: int) -> int:
        """Return how many slots data may use, perhaps less than 0; ``end`` is in clusters."""
        return self.free.slots + self._slots_past(end) - self._missing_tables()

    def _slots_past(self, end: int) -> int:
        """Count the slots between the cluster ``end`` and the bound."""
        table, alignment = self.free.table_clusters, self.free.alignment
        first = -(-(end + alignment) // table)
        return max(0, ((self.bound >> self._bits) + alignment) // table - first)

    def make_run(self, first: int, count: int) -> Run:
        """Make the `Run` of clusters that were chosen and not handed out yet."""
        offset = first << self._bits
        never_written = offset >= max(self.end, self._written_end)
        return Run(offset, count << self._bits, never_written=never_written)

    def hand_out(self, run: Run) -> None:
        """Put a chosen run into use; the caller must not have awaited since the choice."""
        self.end = max(self.end, run.end)
        clusters = run.length >> self._bits
        self.handed_out += clusters
        self.mark_used(run.offset >> self._bits, clusters)

    def mark_used(self, first: int, count: int) -> None:
        """Put a run of clusters into use, whether they were chosen or are still in `free`."""
        self.free.remove(first, count)
        self._cancel_punching(first, count)
        self._record_change(first, count)

    def _cancel_punching(self, first: int, count: int) -> None:
        """Remove a run from `unpunched` and `maybe_holes`, so that it is not punched."""
        for clusters in (self.unpunched, self.maybe_holes):
            if clusters.count:
                clusters.remove(first, count)

    # Taking back

    def put_back(self, first: int, count: int) -> None:
        """Undo the choice of clusters that were not handed out."""
        if first << self._bits < self.end:
            self.free.add(first, count)

    def release(self, run: Run) -> None:
        """Free a run that was handed out, and to which no entry has referred since."""
        self.free_run(run.offset >> self._bits, run.length >> self._bits)
        self.lower_end()

    def free_run(self, first: int, count: int) -> None:
        """Free a run of clusters; neither an entry nor a request may refer to them."""
        self.free.add(first, count)
        self.unpunched.add(first, count)
        self._record_change(first, count)

    def free_block(self, block: int, bits: int) -> None:
        """Free the clusters of a block whose bits are set in ``bits``.

        Neither an entry nor a request may refer to the clusters.  The scan must have ended, because
        the change is not recorded for it.
        """
        self.free.add_block(block, bits)
        self.unpunched.add_block(block, bits)

    def lower_end(self) -> None:
        """Lower `end` past the free clusters directly below it, if there are any."""
        end = self.end >> self._bits
        count = self.free.count_below(end)
        if count:
            self.free.remove(end - count, count)
            self._cancel_punching(end - count, count)
            self.shrink((end - count) << self._bits)

    def shrink(self, end: int) -> None:
        """Lower the attribute `end` to the argument, a file offset, unless it is lower already.

        The caller must ensure that no cluster past the new `end` is in use or in `free`.
        """
        if end < self.end:
            self._written_end = max(self._written_end, self.end)
            self.end = end
            self.tail_is_free = True

    # The free tail of the file

    def note_tail_handled(self) -> None:
        """Note that no free tail waits any more: its cut begins now, or the file has none."""
        self.tail_is_free = False

    def note_tail_remains(self) -> None:
        """Note that the free tail still has to be cut off, because the cut has failed."""
        self.tail_is_free = True

    def note_tail_cut(self, length: int) -> None:
        """Note that the file was cut to ``length`` bytes, so clusters past it read as zeros."""
        self._written_end = length

    # Results of the scan

    def adopt_block(self, block: int, bits: int, holes: int = 0) -> None:
        """Free the clusters of a block whose bits are set in ``bits``; the scan has found them.

        No entry may refer to the clusters.  A bit in ``holes`` marks a cluster that is a hole of
        the host's file according to the scan; `Reclaim` does not punch this cluster.
        """
        self.free.add_block(block, bits)
        self.maybe_holes.add_block(block, bits & ~holes)

    def finish_scan(self, *, all_holes: bool = False) -> None:
        """Note that the scan has passed all tables; with ``all_holes``, punch nothing it found."""
        if all_holes:
            self.maybe_holes = self.free.empty_like()
        self.scan_complete = True
