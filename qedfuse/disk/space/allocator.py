"""Which clusters of the file are free, and how long the file has to be.

Clusters that are free are handed out before the file grows, the lowest first.  The file
never needs to be longer than its *bound*: header, L1 table, an L2 table for each part of
the disk, and one cluster for each cluster of the disk.  Counting alone does not keep
that promise, because a table needs neighbouring clusters: a guest could leave only
single free clusters, have a table made at the end, lose that table in a crash, fill up
its place with data, and begin anew.  Therefore data may not take the last places that
tables could have (see docs/space.md for the proof):

    places in free runs + places between the end and the bound >= tables still to be made

where a *place* is room for a table (`FreeMap`).

Only the allocator has the file's length changed (`FileLength`).  What was grown too far
is cut off again when the image is quiet (`truncate_tail`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from qedfuse.disk.space.filelength import FileLength
from qedfuse.disk.space.freemap import BLOCK, FreeMap
from qedfuse.errors import NoSpaceError
from qedfuse.ondisk.constants import MAX_OFFSET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

MAX_FREE: Final = 1 << 28
"""Most free clusters that are noted at opening: 16 TiB in clusters of 64 KiB.  Of a sparse
file that claims to be longer the rest is found at the next opening, or never."""


class Run(NamedTuple):
    """Neighbouring clusters: a file offset, and a length in bytes.

    ``blank`` says that they read as zeros, because nothing was ever written there.
    """

    offset: int
    length: int
    blank: bool

    @property
    def end(self) -> int:
        """The file offset just past the run."""
        return self.offset + self.length


async def _no_room() -> bool:
    """Find no more room."""
    return False


class Allocator:
    """Hands out clusters: free ones first, then new ones at the end.

    Attributes:
        cluster_bits: Shift between clusters and bytes.
        anchor: The first cluster behind the L1 table.
        end: File offset past the last cluster that is not free.
        free: Clusters below ``end`` that may be handed out.
        unpunched: Those of them that take up space on the host, or may.
        maybe_holes: Those that were free already when the image was opened, which may be
            holes; the host is asked before they are punched.
        shrunk: Whether the file is longer than it needs to be because clusters at its
            end were given up.
        scan_complete: Whether all free clusters are known; before that, few or none are.
        hurry: Awaited where the file would grow; frees what can be freed, if that is much.
        is_hurry: Tells whether there is anything for ``reclaim_before_growth`` to do.
        find_room: Asked before the file would grow past its bound; tells whether it has
            found, or waited for, anything.
    """

    def __init__(
        self,
        file: HostFile,
        header: Header,
        missing_tables: Callable[[], int] = lambda: 0,
    ) -> None:
        """Allocate in ``file``; ``missing_tables()`` tables may still have to be made."""
        self._file = file
        self._geometry = geometry = header.geometry
        self.cluster_bits = self._bits = geometry.cluster_bits
        self._missing_tables = missing_tables
        self._length = FileLength(file, geometry)
        self.end = self._used_end = self._length.end
        self.anchor = header.l1_end >> self._bits
        self.free = FreeMap(geometry.table_size, self.anchor)
        self.unpunched = self.make_map()
        self.maybe_holes = self.make_map()
        self.scan_complete = False
        self.reclaim_before_growth: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.should_reclaim: Callable[[], bool] = lambda: False
        self.wait_for_free_clusters: Callable[[], Awaitable[bool]] = _no_room
        self._witnesses: FreeMap | None = None
        self.tail_is_free = False
        self.set_size(header)

    def set_size(self, header: Header) -> None:
        """Take note of the disk's size: it decides how long the file may get."""
        self.bound = self._geometry.bound(header.header_end, header.image_size)

    async def allocate(self, clusters: int) -> Run:
        """Take a run of up to ``clusters`` clusters; the caller asks again for the rest.

        Raises:
            NoSpaceError: The file cannot grow any more.
        """
        if not self.free.count:
            await self.reclaim_before_growth()
        found = self._choose(clusters)
        while found is None and await self.wait_for_free_clusters():
            found = self._choose(clusters)
        if found is None:
            # The image came with more in it than its disk can need, or with its free
            # clusters scattered by another program.
            found = self.free.take(1) or (self.end >> self._bits, 1)
        return await self._place(*found)

    def try_allocate(self, clusters: int) -> Run | None:
        """Take a run of just as many clusters without waiting; None if that cannot be."""
        if not self.free.count and self.should_reclaim():
            return None
        found = self._choose(clusters)
        if found is None:
            return None
        first, count = found
        run = self._run(first, count)
        if count < clusters or not self._length.try_grow(run.end, self.bound):
            if run.offset < self.end:
                self.free.add(first, count)
            return None
        self.end = max(self.end, run.end)
        self.claim(first, count)
        self._used_end = max(self._used_end, run.end)
        return run

    def _choose(self, clusters: int) -> tuple[int, int] | None:
        """Choose clusters for data so that there remain places for all tables.

        No await in here: what it finds is gone for others when it returns.
        """
        end, bound = self.end >> self._bits, self.bound >> self._bits
        spare = self._spare(end)
        # A run that is taken costs no more places than this.
        worst = clusters // self.free.table + clusters // BLOCK + 2
        most = clusters if spare >= worst else 1
        if self.free.count:
            if spare > 0:
                return self.free.take(most)
            rest = self.free.take_rest()
            if rest is not None:
                return rest, 1
        if end < bound and (spare > 0 or (end + self.free.shift) % self.free.table):
            return end, min(most, bound - end)
        # What is left past the last place is good for data only.
        top = max(end, bound - (bound + self.free.shift) % self.free.table)
        if top < bound:
            self._skip_to(top)
            return top, 1
        return None

    def _skip_to(self, cluster: int) -> None:
        """Move the end up; what lies between is free."""
        end = self.end >> self._bits
        if cluster > end:
            self.end = cluster << self._bits
            self.give_back(end, cluster - end)

    def _spare(self, end: int) -> int:
        """Count the places that no table is going to need; ``end`` in clusters."""
        return self.free.places + self._places_past(end) - self._missing_tables()

    def _places_past(self, end: int) -> int:
        """Count the places between a cluster and the bound."""
        table, shift = self.free.table, self.free.shift
        first = -(-(end + shift) // table)
        return max(0, ((self.bound >> self._bits) + shift) // table - first)

    async def allocate_table(self) -> Run:
        """Take the clusters of a new table.

        Raises:
            NoSpaceError: The file cannot grow any more.
        """
        found = self._choose_table()
        while found is None and await self.wait_for_free_clusters():
            found = self._choose_table()
        if found is None:
            found = self.end >> self._bits
        return await self._place(found, self.free.table)

    def claim(self, first: int, count: int) -> None:
        """Take a run of clusters that are free, or are just being put into use."""
        self.free.remove(first, count)
        self._forget(first, count)
        self.record_change(first, count)

    def _forget(self, first: int, count: int) -> None:
        """Note that a run is no business of the host's any more."""
        for clusters in (self.unpunched, self.maybe_holes):
            if clusters.count:
                clusters.remove(first, count)

    # For who moves what is there already, so that no more will be in use afterwards

    async def take(self, clusters: int, above: int | None = None) -> Run | None:
        """Take the lowest free run of up to ``clusters`` clusters; None if nothing is free.

        With ``above`` only from that cluster on, and at the end of the file if nothing
        else is free there.

        Raises:
            NoSpaceError: The file cannot grow any more.
        """
        if above is None:
            found = self.free.take(clusters)
        else:
            found = self.free.take_from(above, clusters) or (self.end >> self._bits, clusters)
        return found and await self._place(*found)

    async def extend_table(self) -> Run:
        """Take the clusters of a table at the end of the file, whatever is free before it.

        Raises:
            NoSpaceError: The file cannot grow any more.
        """
        return await self._place(self.end >> self._bits, self.free.table)

    def _choose_table(self) -> int | None:
        """Choose the first cluster of a new table; no await in here."""
        found = self.free.take_place()
        if found is not None:
            return found
        end, table = self.end >> self._bits, self.free.table
        # A table across the border of two blocks would not be counted as a place if it
        # was lost in a crash.
        if (end + self.free.shift) % BLOCK > BLOCK - table:
            end += -(end + self.free.shift) % BLOCK
        if end + table > self.bound >> self._bits:
            found = self.free.find_run(table)
            if found is not None:
                self.free.remove(found, table)
            return found
        self._skip_to(end)
        return end

    async def _place(self, first: int, count: int) -> Run:
        """Make a run of clusters that were chosen; the file reaches over it afterwards."""
        run = self._run(first, count)
        if run.end > MAX_OFFSET:
            msg = f"{self._file.name}: file size: found {run.end}, expected at most {MAX_OFFSET}"
            raise NoSpaceError(msg)
        # No await between choosing the end and moving it: no two runs overlap.
        self.end = max(self.end, run.end)
        self.claim(first, count)
        try:
            # It may have been given back because the file could not grow over it.
            await self._length.grow(run.end, self.bound)
        except BaseException:
            self.release(run)
            raise
        self._used_end = max(self._used_end, run.end)
        return run

    def _run(self, first: int, count: int) -> Run:
        """Describe a run of clusters that were chosen, but not claimed yet."""
        offset = first << self._bits
        blank = offset >= max(self.end, self._used_end)
        return Run(offset, count << self._bits, blank=blank)

    def release(self, run: Run) -> None:
        """Take back clusters that no table refers to, or ever did since they were given out."""
        self.give_back(run.offset >> self._bits, run.length >> self._bits)
        self.lower_end()

    def give_back(self, first: int, count: int) -> None:
        """Note clusters as free that neither a table nor a request refers to any more."""
        self.free.add(first, count)
        self.unpunched.add(first, count)
        self.record_change(first, count)

    def give_back_block(self, block: int, bits: int) -> None:
        """Do the same for clusters of one block of the map."""
        self.free.add_block(block, bits)
        self.unpunched.add_block(block, bits)

    def adopt_block(self, block: int, bits: int, holes: int = 0) -> None:
        """Add clusters of one block of the map that the scan found to be free.

        Those in ``holes`` take up no space on the host.
        """
        self.free.add_block(block, bits)
        self.maybe_holes.add_block(block, bits & ~holes)

    def make_map(self) -> FreeMap:
        """Make an empty map of the file's clusters, with blocks where those of ``free`` are."""
        return FreeMap(self._geometry.table_size, self.anchor, counted=False)

    def lower_end(self) -> None:
        """Take the free clusters at the end for not part of the file any more."""
        end = self.end >> self._bits
        count = self.free.before(end)
        if count:
            self.free.remove(end - count, count)
            self._forget(end - count, count)
            self.shrink((end - count) << self._bits)

    def shrink(self, end: int) -> None:
        """Note that nothing from the file offset ``end`` on is in use."""
        if end < self.end:
            self._used_end = max(self._used_end, self.end)
            self.end = end
            self.tail_is_free = True

    async def truncate_tail(self) -> bool:
        """Cut off the end of the file that is not in use, if there is one; tell if there was.

        A crash may lose the cut.  What is grown from there on is blank.
        """
        length = self._length
        async with length.lock:
            # An odd tail is left alone while nothing is given up and nothing is added.
            if length.end <= self.end or (length.has_tail and not self.tail_is_free):
                self.tail_is_free = False
                return False
            self.tail_is_free = False
            try:
                await length.cut(self.end)
            except BaseException:
                self.tail_is_free = True
                raise
            self._used_end = length.end
            return True

    # What the scan finds out

    def watch(self, witnesses: FreeMap | None) -> None:
        """Have each cluster noted that changes its state from now on."""
        self._witnesses = witnesses

    @property
    def watched(self) -> bool:
        """Whether somebody wants to know which clusters change their state."""
        return self._witnesses is not None

    def record_change(self, first: int, count: int) -> None:
        """Note that a run changed its state: what the scan reads about it says nothing."""
        if self._witnesses is not None:
            self._witnesses.add(first, count)
