"""Finding the free space of a file: whatever no table refers to.

One walk over all L2 tables, in the background after an image was opened for writing.
It finds what was freed before, and what crashes leaked, ours and those of other programs.

The tables change while they are read.  That does no harm: each cluster that is given
out, put into quarantine or given back meanwhile is noted as seen by those who do it
(`Allocator.witness`), so only what nobody referred to at the beginning, and nobody has
touched since, is left over in the end.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import trio

from qedfuse.disk.freemap import FreeMap
from qedfuse.disk.references import References
from qedfuse.disk.tablecache import L2
from qedfuse.errors import QedError
from qedfuse.ondisk.constants import ZERO
from qedfuse.ondisk.table import SLICE_BYTES, decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.allocator import Allocator
    from qedfuse.disk.layer import QedLayer
    from qedfuse.disk.reclaim import Reclaim

log = logging.getLogger(__name__)


class Scan:
    """One scan of an open image."""

    def __init__(self, layer: QedLayer, allocator: Allocator, reclaim: Reclaim) -> None:
        """Scan the image of ``layer``; `begin` before the first change, then `run`."""
        self._layer = layer
        self._allocator = allocator
        self._reclaim = reclaim
        self._tables: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._end = 0
        self._witnessed = FreeMap()
        self._seen = References(0, layer.file.name)
        self._duplicates = 0

    @property
    def witnessed(self) -> FreeMap:
        """The clusters that have changed their state since `begin`, until `run` has ended."""
        return self._witnessed

    def begin(self) -> None:
        """Note what there is to scan; from here on changes are watched."""
        self._tables = self._layer.l2_tables
        self._end = self._allocator.end
        self._allocator.watch(self._witnessed)

    async def run(self) -> None:
        """Walk the tables and tell the allocator what is free.

        May be run again, from the beginning, after it was cancelled.
        """
        if self._reclaim.ready.is_set():
            return
        try:
            await self._walk()
        except QedError as error:
            # The disk works without: nothing is used again, and the file grows.
            log.warning("%s (while looking for free space)", error)
        else:
            self._tell()
        self._allocator.watch(None)
        self._seen = References(0, self._layer.file.name)
        self._reclaim.settle()

    async def _walk(self) -> None:
        """Mark what the tables refer to."""
        layer, bits = self._layer, self._allocator.cluster_bits
        header, length = layer.header, layer.geometry.table_bytes
        self._seen = seen = References(self._end >> bits, layer.file.name)
        self._duplicates = 0
        seen.claim_range(0, header.header_end >> bits)
        seen.claim_range(header.l1_table_offset >> bits, header.l1_end >> bits)
        for table in self._tables:
            start = int(table)
            end = start + length
            seen.claim_range(start >> bits, end >> bits)
            position = start
            while position < end:
                # Holes of a sparse table refer to nothing.
                data = await layer.file.next_data(position)
                if data is None or data >= end:
                    break
                position = data - (data - start) % SLICE_BYTES
                await self._slice(position, min(SLICE_BYTES, length))
                position += SLICE_BYTES
            # A slice is half a millisecond; then requests get their turn.
            await trio.lowlevel.checkpoint()

    async def _slice(self, offset: int, length: int) -> None:
        """Mark what one slice of a table refers to."""
        entries = decode(await self._layer.file.pread(offset, length))
        values = np.frombuffer(entries, np.uint64)
        good = values > ZERO
        bad = self._layer.tables.verdict(L2, offset, entries)
        if bad is not None:
            good &= np.frombuffer(bad, np.uint8) == 0
        clusters = values[good] >> np.uint64(self._allocator.cluster_bits)
        taken = self._seen.claim(clusters)
        if taken.any():
            # A cluster that was moved meanwhile is seen twice, and that is all right.
            again = (int(cluster) for cluster in clusters[taken])
            self._duplicates += sum(not self._witnessed.holds(at, 1) for at in again)

    def _tell(self) -> None:
        """Tell the allocator what nobody referred to; no await in here."""
        layer, allocator, bits = self._layer, self._allocator, self._allocator.cluster_bits
        if self._duplicates:
            layer.damaged = True
            self._reclaim.untrusted_end = self._end
            log.error(
                "%s: found %d references to clusters that have another owner, expected none: "
                "the image must be repaired; until then space that is freed is not used again",
                layer.file.name,
                self._duplicates,
            )
        last = self._seen.end()
        if allocator.end == self._end:
            # What lies behind the last reference is not free space but no part of the file.
            last = max(last, self._witnessed.end())
            allocator.shrink(last << bits)
        found = FreeMap()
        for first, count in self._seen.free(min(last, self._seen.clusters)):
            found.add(first, count)
        for first, count in self._witnessed.runs():
            found.remove(first, count)
        allocator.adopt(found.runs())
        log.debug("%s: free clusters: %d", layer.file.name, allocator.free.count)
