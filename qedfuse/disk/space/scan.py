"""Finding the free space of a file: whatever no table refers to.

One walk over all L2 tables, in the background after an image was opened for writing.
It finds what was freed before, and what crashes leaked, ours and those of other programs.

The tables change while they are read.  That does no harm: each cluster that is given
out, put into quarantine or given back meanwhile is noted as seen by those who do it
(`Allocator.record_change`), so only what nobody referred to at the beginning, and nobody has
touched since, is left over in the end.

Where a free list says what is free, the scan is postponed until a table is going to be
changed, and then decides which of the listed clusters are free.  Checksums do not make a
list true: a cluster that some table refers to must not be handed out, cut off or punched
because a stranger's image lists it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.lookup.tablecache import L2
from qedfuse.disk.space.allocator import MAX_FREE
from qedfuse.disk.space.freemap import BLOCK
from qedfuse.disk.space.l2tables import claim_tables, filled
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.errors import QedError
from qedfuse.ondisk.constants import ENTRY_BYTES, ZERO
from qedfuse.ondisk.table import SLICE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.freemap import FreeMap
    from qedfuse.disk.space.reclaim import Reclaim

log = logging.getLogger(__name__)


_MANY: Final = 1 << 18
"""Free clusters from which on the host is not asked about each run whether it is a hole.

It would take seconds at each close.  That the file as a whole is no larger than what is in
use says nearly as much.
"""

_SHORT_SCAN_BYTES: Final = 8 << 20
"""Bytes of L2 tables whose scan a caller may wait for: those of 64 GiB of data."""


class Scan:
    """One scan of an open image.

    Attributes:
        witnessed: Clusters whose state changed since `begin`.
    """

    def __init__(self, layer: QedLayer, allocator: Allocator, reclaim: Reclaim) -> None:
        """Scan the image of ``layer``; `begin` before the first change, then `run`."""
        self._layer = layer
        self._allocator = allocator
        self._reclaim = reclaim
        self._tables: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._end = 0
        self.witnessed = allocator.make_map()
        self._seen = OwnerBitmap(0, layer.file.name)
        self._gone = allocator.make_map()
        self._duplicates = 0
        self._walked = -1
        self._wild = False
        self._running = trio.Lock()
        self._due = trio.Event()
        self._due.set()
        self._listed = self._holding_list = allocator.make_map()

    def begin(self) -> None:
        """Note what there is to scan; from here on changes are watched."""
        self._tables = self._layer.l2_tables
        self._wild = self._layer.damaged
        self._end = self._allocator.end
        self._seen = OwnerBitmap(self._end >> self._allocator.cluster_bits, self._layer.file.name)
        self._allocator.watch(self.witnessed)
        self._reclaim.on_retire = self._retired

    def postpone(self, listed: FreeMap, holding_list: FreeMap) -> None:
        """Put the scan off until `before_table_change`.

        Args:
            listed: The clusters that a list says are free.  Nothing is done with them
                before the scan has found them to be.
            holding_list: Those of them that hold the list; the others are holes of the
                host's file.
        """
        self._listed, self._holding_list = listed, holding_list
        self._due = trio.Event()

    @property
    def is_short(self) -> bool:
        """Whether a scan takes some milliseconds at most."""
        return len(self._layer.l2_tables) * self._layer.geometry.table_bytes <= _SHORT_SCAN_BYTES

    @property
    def is_postponed(self) -> bool:
        """Whether nobody has needed the scan yet."""
        return not self._due.is_set()

    async def before_table_change(self) -> None:
        """Start a postponed scan; return at its end if it is a short one.

        While a longer one is under way the file grows, within its bound.
        """
        if self._listed.count and not self._reclaim.ready.is_set():
            self._due.set()
            if self.is_short:
                await self.run()

    async def run_when_due(self) -> None:
        """Scan, unless nobody needs it: a background task."""
        await self._due.wait()
        await self.run()

    async def run(self) -> None:
        """Walk the tables and tell the allocator what is free.

        Whoever calls it while it is running waits for its end.  It may be run again, from
        the beginning, after it was cancelled.
        """
        self._due.set()
        async with self._running:
            if not self._reclaim.ready.is_set():
                await self._run()

    async def _run(self) -> None:
        """Walk the tables from the beginning."""
        try:
            await self._walk()
        except QedError as error:
            # The disk works without: nothing is used again, and the file grows.
            log.warning("%s (while looking for free space)", error)
        else:
            await self._tell()
            self._allocator.scan_complete = True
        self._allocator.watch(None)
        self._reclaim.on_retire = lambda _first, _count, _slice: None
        self._seen = OwnerBitmap(0, self._layer.file.name)
        self._reclaim.settle()

    async def _walk(self) -> None:
        """Mark what the tables refer to."""
        layer, bits = self._layer, self._allocator.cluster_bits
        header, length = layer.header, layer.geometry.table_bytes
        self._seen = seen = OwnerBitmap(self._end >> bits, layer.file.name)
        self._walked = -1
        for first, count in self._gone.runs():
            seen.claim_range(first, first + count)
        seen.claim_range(0, header.header_end >> bits)
        seen.claim_range(header.l1_table_offset >> bits, header.l1_end >> bits)
        await claim_tables(seen, self._tables, layer.geometry)
        # Holes of a sparse file refer to nothing, be they whole tables or parts of one.
        held = await filled(layer.file, self._tables, length)
        for start in self._tables[held].tolist():
            end = start + length
            position = start
            while position < end:
                data = await layer.file.next_data(position)
                if data is None or data >= end:
                    break
                position = data - (data - start) % SLICE_BYTES
                await self._slice(start, (position - start) // ENTRY_BYTES)
                position += SLICE_BYTES
                # A slice is half a millisecond; then requests get their turn.
                await trio.lowlevel.checkpoint()

    async def _slice(self, table: int, index: int) -> None:
        """Mark what one slice of a table refers to.

        It is looked at as requests see it: a reference that was dropped a moment ago is
        not there, whatever the file says.
        """
        tables = self._layer.tables
        cached = tables.cached(table, index)
        part = cached or await tables.load(table, index, L2)
        values = np.array(part.entries, np.uint64)
        good = values > ZERO
        if part.bad is not None:
            self._wild = True
            good &= np.frombuffer(part.bad, np.uint8) == 0
        clusters = values[good] >> np.uint64(self._allocator.cluster_bits)
        # What was added since the beginning is not ours to judge.
        clusters = clusters[clusters < self._seen.clusters]
        # Nothing that was there at the beginning is given to anybody before the end of the
        # scan, so whatever is referred to twice has two owners.
        self._duplicates += int(self._seen.claim(clusters).sum())
        self._walked = part.offset
        if cached is None:
            tables.evict(part)

    def _retired(self, first: int, count: int, dropped_by: int) -> None:
        """Note clusters that have just lost a reference: another one makes two owners.

        A slice that has not been walked yet does not show any more what it has dropped.
        """
        last = min(first + count, self._seen.clusters)
        if first < last:
            self._duplicates += self._gone.holds(first, last - first)
            self._gone.add(first, last - first)
            if dropped_by > self._walked:
                self._duplicates += self._seen.owned(first, last - first).bit_count()
                self._seen.claim_range(first, last)

    async def _tell(self) -> None:
        """Tell the allocator what nobody referred to."""
        layer, allocator, bits = self._layer, self._allocator, self._allocator.cluster_bits
        if self._duplicates or self._wild:
            self._distrust()
            return
        last = self._seen.clusters
        if allocator.end == self._end:
            # What lies behind the last reference is not free space but no part of the file.
            last = max(self._seen.end(), self.witnessed.end())
            allocator.shrink(last << bits)
        shift = allocator.free.shift
        listed_in_use = 0
        for block in range(-(-(last + shift) // BLOCK)):
            first = block * BLOCK - shift
            # The file may have been cut meanwhile.
            last = min(last, allocator.end >> bits)
            if first >= last:
                break
            inside = (1 << min(BLOCK, last - first)) - 1
            if not block:
                inside &= -1 << shift
            # No await between asking who changed since and telling: who changes a cluster
            # from then on finds it told already.
            owned, listed = self._seen.owned(first, BLOCK), self._listed.bits(block)
            found = inside & ~owned & ~self.witnessed.bits(block)
            if found:
                allocator.adopt_block(block, found, listed & ~self._holding_list.bits(block))
            listed_in_use += (listed & owned & ~self.witnessed.bits(block)).bit_count()
            if allocator.free.count >= MAX_FREE:
                break
            await trio.lowlevel.checkpoint()
        if listed_in_use:
            log.error(
                "%s: free list: found %d clusters listed as free that table entries refer to, "
                "expected none: the list is dropped, and the tables are believed",
                layer.file.name,
                listed_in_use,
            )
        if allocator.free.count > _MANY and self._is_sparse():
            allocator.maybe_holes = allocator.make_map()
        log.debug("%s: free clusters: %d", layer.file.name, allocator.free.count)

    def _distrust(self) -> None:
        """Leave alone what the image held when it was opened, since its tables are damaged.

        What seems to be free may belong to an entry that points elsewhere by mistake, and
        a check may find it.
        """
        self._reclaim.untrusted_end = self._end
        what = "table entries that point to nowhere"
        if self._duplicates:
            what = f"{self._duplicates} references to clusters that have another owner"
        self._layer.mark_damaged()
        log.error(
            "%s: found %s, expected none: the image must be repaired; until then no space is "
            "used again that was in use when it was opened",
            self._layer.file.name,
            what,
        )

    def _is_sparse(self) -> bool:
        """Tell whether the file takes up no more space than what is in use in it."""
        allocator = self._allocator
        used = (allocator.end >> allocator.cluster_bits) - allocator.free.count
        return self._layer.file.stat().st_blocks * 512 <= used << allocator.cluster_bits
