"""Placement: which clusters of the file are free, and which are handed out next.

Free clusters are handed out before the file grows, the lowest first.  The file never
needs to be longer than its *bound*: header, L1 table, an L2 table for each part of the
disk, and one cluster for each cluster of the disk.  Counting alone does not keep that
promise, because a table needs neighbouring clusters: a guest could leave only single
free clusters, make a table at the end, lose that table in a crash, fill its clusters with
data, and begin again.  Therefore data must leave enough *table slots*, runs of free
clusters as long as a table (`FreeMap`), for all tables (see docs/space.md for the proof):

    slots in free runs + slots between the end and the bound >= tables still missing

Nothing here waits or calls the host.  `FileLength` makes the file as long as the clusters
need, and `SpaceManager` waits for free clusters where there are none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.space.freemap import BLOCK_CLUSTERS, FreeMap

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.space.marking import Marking
    from qedfuse.ondisk.header import Header

MAX_FREE_CLUSTERS: Final = 1 << 28
"""Most free clusters that are recorded at opening: 16 TiB in clusters of 64 KiB.  If a
sparse file claims more, the rest is found at the next opening, or never."""


class Run(NamedTuple):
    """Neighbouring clusters: a file offset, and a length in bytes.

    ``never_written`` says that they read as zeros, because they are new in the file.
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

    Clusters are handed out in two steps, without an await in between: they are chosen,
    which removes them from the free ones, and `hand_out` puts them into use.

    Attributes:
        cluster_bits: Shift between clusters and bytes.
        anchor: The first cluster behind the L1 table.
        bound: File offset that `end` does not exceed, except for an image that came with
            more in use than its disk can need.
        end: File offset past the last cluster that is not free.
        free: Clusters below ``end`` that may be handed out.
        unpunched: Free clusters that take up space on the host, or may.
        maybe_holes: Free clusters that the scan found, which may be holes of the host's
            file; the host is asked before they are punched.
        tail_is_free: Whether the file is longer than it needs to be because clusters at
            its end were given up.
        scan_complete: Whether all free clusters are known; before that, few or none are.
    """

    def __init__(
        self,
        header: Header,
        end: int,
        missing_tables: Callable[[], int],
        marking: Marking,
    ) -> None:
        """Allocate in a file whose whole clusters reach up to the file offset ``end``.

        ``missing_tables()`` tables may still have to be made; ``marking`` records changes
        for the scan.
        """
        self._geometry = geometry = header.geometry
        self.cluster_bits = self._bits = geometry.cluster_bits
        self._missing_tables = missing_tables
        self._record_change = marking.record_change
        self.end = end
        # Clusters from this offset and from ``end`` on were not written to since the file
        # has had them, so they read as zeros.
        self._written_end = end
        self.anchor = header.l1_end >> self._bits
        self.free = FreeMap(geometry.table_size, self.anchor)
        self.unpunched = self.free.empty_like()
        self.maybe_holes = self.free.empty_like()
        self.scan_complete = False
        self.tail_is_free = False
        self.set_size(header)

    def set_size(self, header: Header) -> None:
        """Compute `bound` for the disk's size."""
        self.bound = self._geometry.bound(header.header_end, header.image_size)

    # Choosing and handing out

    def choose(self, clusters: int) -> tuple[int, int] | None:
        """Choose up to ``clusters`` clusters for data, leaving slots for all tables.

        Returns:
            The first cluster and how many; None if the bound leaves none.
        """
        end, bound = self.end >> self._bits, self.bound >> self._bits
        spare = self._spare_slots(end)
        # A run that is taken costs at most this many slots.
        worst = clusters // self.free.table + clusters // BLOCK_CLUSTERS + 2
        limit = clusters if spare >= worst else 1
        if self.free.count:
            if spare > 0:
                return self.free.take(limit)
            remainder = self.free.take_remainder()
            if remainder is not None:
                return remainder, 1
        if end < bound and (spare > 0 or (end + self.free.shift) % self.free.table):
            return end, min(limit, bound - end)
        # Clusters past the last slot are of use for data only.
        top = max(end, bound - (bound + self.free.shift) % self.free.table)
        if top < bound:
            self._skip_to(top)
            return top, 1
        return None

    def choose_any(self) -> tuple[int, int]:
        """Choose one cluster for data where `choose` found none: free, or past the bound.

        Happens only where the image came with more in use than its disk can need, or
        where another program has scattered its free clusters.
        """
        return self.free.take(1) or (self.end >> self._bits, 1)

    def choose_table(self) -> int | None:
        """Choose the clusters of a new table.

        Returns:
            The first of them; None if the bound leaves none.
        """
        found = self.free.take_slot()
        if found is not None:
            return found
        end, table = self.end >> self._bits, self.free.table
        # A table across the border of two blocks would not count as a slot if a crash
        # lost it.
        if (end + self.free.shift) % BLOCK_CLUSTERS > BLOCK_CLUSTERS - table:
            end += -(end + self.free.shift) % BLOCK_CLUSTERS
        if end + table > self.bound >> self._bits:
            found = self.free.find_run(table)
            if found is not None:
                self.free.remove(found, table)
            return found
        self._skip_to(end)
        return end

    def _skip_to(self, cluster: int) -> None:
        """Move the end up; the clusters in between are free."""
        end = self.end >> self._bits
        if cluster > end:
            self.end = cluster << self._bits
            self.free_run(end, cluster - end)

    def _spare_slots(self, end: int) -> int:
        """Count the slots that no table will need; ``end`` is in clusters."""
        return self.free.slots + self._slots_past(end) - self._missing_tables()

    def _slots_past(self, end: int) -> int:
        """Count the slots between a cluster and the bound."""
        table, shift = self.free.table, self.free.shift
        first = -(-(end + shift) // table)
        return max(0, ((self.bound >> self._bits) + shift) // table - first)

    def describe(self, first: int, count: int) -> Run:
        """Describe clusters that were chosen and not handed out yet."""
        offset = first << self._bits
        never_written = offset >= max(self.end, self._written_end)
        return Run(offset, count << self._bits, never_written=never_written)

    def hand_out(self, run: Run) -> None:
        """Put a run into use that was chosen, and just been described."""
        self.end = max(self.end, run.end)
        self.claim(run.offset >> self._bits, run.length >> self._bits)

    def claim(self, first: int, count: int) -> None:
        """Put a run of clusters into use that are free or were chosen."""
        self.free.remove(first, count)
        self._cancel_punching(first, count)
        self._record_change(first, count)

    def _cancel_punching(self, first: int, count: int) -> None:
        """Remove a run from the clusters that will be punched."""
        for clusters in (self.unpunched, self.maybe_holes):
            if clusters.count:
                clusters.remove(first, count)

    # Taking back

    def put_back(self, first: int, count: int) -> None:
        """Undo the choice of clusters that were not handed out."""
        if first << self._bits < self.end:
            self.free.add(first, count)

    def release(self, run: Run) -> None:
        """Take back a run to which no entry has referred since it was handed out."""
        self.free_run(run.offset >> self._bits, run.length >> self._bits)
        self.lower_end()

    def free_run(self, first: int, count: int) -> None:
        """Make clusters free to which no entry and no request refers any more."""
        self.free.add(first, count)
        self.unpunched.add(first, count)
        self._record_change(first, count)

    def free_block(self, block: int, bits: int) -> None:
        """Make clusters of one block of the map free, as `give_back` does."""
        self.free.add_block(block, bits)
        self.unpunched.add_block(block, bits)

    def lower_end(self) -> None:
        """Stop counting free clusters at the end as part of the file."""
        end = self.end >> self._bits
        count = self.free.count_below(end)
        if count:
            self.free.remove(end - count, count)
            self._cancel_punching(end - count, count)
            self.shrink((end - count) << self._bits)

    def shrink(self, end: int) -> None:
        """Note that no cluster from the file offset ``end`` on is in use."""
        if end < self.end:
            self._written_end = max(self._written_end, self.end)
            self.end = end
            self.tail_is_free = True

    # What becomes of the end of the file

    def keep_tail(self) -> None:
        """Note that the tail of the file need not be cut off: that is being done, or it stays."""
        self.tail_is_free = False

    def tail_remains(self) -> None:
        """Note that the tail of the file has still to be cut off: the host has refused."""
        self.tail_is_free = True

    def tail_was_cut(self, length: int) -> None:
        """Note that the file has ``length`` bytes now; what it grows by reads as zeros."""
        self._written_end = length

    # What the scan finds

    def adopt_block(self, block: int, bits: int, holes: int = 0) -> None:
        """Add clusters of one block of the map that the scan found to be free.

        Those in ``holes`` take up no space on the host.
        """
        self.free.add_block(block, bits)
        self.maybe_holes.add_block(block, bits & ~holes)

    def finish_scan(self, *, all_holes: bool = False) -> None:
        """Note that all free clusters are known.

        With ``all_holes`` those that the scan found take up no space on the host.
        """
        if all_holes:
            self.maybe_holes = self.free.empty_like()
        self.scan_complete = True
