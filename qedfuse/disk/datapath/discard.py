"""Giving clusters up: discards, ranges of zeros, and clusters of zeros that are written.

A cluster that is given up becomes unallocated, or a zero cluster where the base would
show through (S1).  Its place in the file goes into quarantine.  A part of a cluster is
zeroed in place, so that a range reads as zeros in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.datapath.zeroes import zero_runs
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.tablecache import L2
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from qedfuse.ondisk.table import runs
from qedfuse.util.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.tablecache import Slice
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback

    Progress = Callable[[int, int], None]

_PIECE: Final = 1024
"""Clusters that are given up before other tasks get a turn."""

_FEW: Final = 64
"""Up to so many clusters are looked at one by one; numpy takes its time to begin."""


class Discard:
    """Makes ranges of the disk read as zeros, and frees what they took."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        write_path: WritePath,
        writeback: MetadataWriteback,
        needcheck: NeedCheck,
        reclaim: Reclaim,
    ) -> None:
        """Change ``layer``, the top of ``chain``."""
        self._chain = chain
        self._layer = layer
        self._write_path = write_path
        self._writeback = writeback
        self._needcheck = needcheck
        self._reclaim = reclaim

    async def discard(self, start: int, end: int, *, free: bool = True) -> None:
        """Make the range from ``start`` to ``end``, within the disk, read as zeros.

        Args:
            start: Guest offset of the first byte.
            end: Guest offset past the last one.
            free: Give up whole clusters; if not, zeros are written over them.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases parts may read as zeros.
        """
        geometry = self._layer.geometry
        first = geometry.ceil(start)
        # Nobody sees what lies past the disk's end, so its last cluster counts as whole.
        last = geometry.ceil(end) if end == self._layer.size else geometry.floor(end)
        if first >= last:
            first = last = min(first, end)
        if start < first:
            await self._write_path.blank(start, first)
        if first < last:
            await self._give_up(first, last, data=free)
        if not free:
            await self._blank_data(first, min(last, end))
        if last < end:
            await self._write_path.blank(last, end)

    async def drop(self, start: int, end: int, progress: Progress | None = None) -> None:
        """Give up whole clusters that have a place, and leave all others as they are.

        Unlike `discard` it makes no tables to hide a base where that shows already, and
        also serves past the disk's end.  Both are guest offsets at cluster boundaries.
        ``progress`` is called with the bytes of the range that are done, and all of them.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases a part may have been dropped.
        """
        if start < end:
            await self._give_up(start, end, data=True, hide=False, progress=progress)

    async def clear(self, start: int, end: int, progress: Progress | None = None) -> None:
        """Make every cluster unallocated, also those of zeros: what is below shows everywhere.

        Both are guest offsets at cluster boundaries; ``progress`` is called as by `drop`.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases a part may have been cleared.
        """
        if start < end:
            await self._give_up(start, end, data=True, hide=False, clear=True, progress=progress)

    async def write(self, start: int, data: memoryview, mode: Literal["on", "unmap"]) -> None:
        """Write bytes; whole clusters of zeros take no space (``detect_zeroes``).

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases parts may have been written.
        """
        end, position = start + len(data), start
        for first, last in zero_runs(data, start, self._layer.geometry):
            if position < first:
                await self._write_path.write(position, data[position - start : first - start])
            await self.discard(first, last, free=mode == "unmap")
            position = last
        if position < end:
            await self._write_path.write(position, data[position - start :])

    async def _blank_data(self, start: int, end: int) -> None:
        """Write zeros over what has a place in the file, and leave it there."""
        step = _PIECE << self._layer.geometry.cluster_bits
        pace = Pace()
        for at in range(start, end, step):
            for extent in await self._layer.lookup(at, min(step, end - at)):
                if extent.kind is Kind.DATA:
                    await self._write_path.blank(extent.start, extent.end, pace)
            await trio.lowlevel.checkpoint()

    async def _give_up(
        self,
        start: int,
        end: int,
        *,
        data: bool,
        hide: bool = True,
        clear: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Give up whole clusters: with ``data`` those with a place, with ``hide`` all others.

        With ``clear`` all become unallocated, whatever shows through then.
        """
        geometry = self._layer.geometry
        step = self._layer.tables.slice_entries << geometry.cluster_bits
        piece = min(step, _PIECE << geometry.cluster_bits)
        begin = start
        while start < end:
            table, reason = await self._layer.table_at(geometry.l1_index(start))
            if reason:
                raise CorruptImageError(reason)
            if table or (hide and start < self._reach):
                # Within one slice of one table; slices and tables are whole pieces.
                stop = min(end, start - start % piece + piece)
                await self._write_path.wait_for_tables()
                await self._give_up_piece(start, stop, data=data, hide=hide, clear=clear)
            else:
                stop = min(end, (geometry.l1_index(start) + 1) * geometry.table_span)
            start = stop
            if progress is not None:
                progress(start - begin, end - begin)
            await trio.lowlevel.checkpoint()

    @property
    def _reach(self) -> int:
        """The guest offset from which on no base shows through."""
        return self._chain.layers[1].size if self._chain.has_base else 0

    async def _give_up_piece(
        self, start: int, end: int, *, data: bool, hide: bool, clear: bool
    ) -> None:
        """Give up clusters whose entries lie in one slice."""
        write_path, geometry = self._write_path, self._layer.geometry
        async with write_path.allocating.hold(start, end):
            shown = await self._shown(start, end) if hide else []
            kinds = await self._kinds(start, end)
            if not (shown or (data and Kind.DATA in kinds) or (clear and Kind.ZERO in kinds)):
                return
            async with self._needcheck.changing():
                table = await write_path.table_for(geometry.l1_index(start))
                index = geometry.l2_index(start)
                part = await write_path.writable_slice(table, index, L2)
                # No await from here on: an entry is dropped and its cluster put into
                # quarantine in one step.
                if data:
                    self._drop(part, start, end, clear=clear)
                tables = self._layer.tables
                base = index % tables.slice_entries - (start >> geometry.cluster_bits)
                for cluster in shown:
                    if part.entries[base + cluster] == UNALLOCATED:
                        tables.fill(part, base + cluster, 1, ZERO)
                self._writeback.note_write()

    async def _kinds(self, start: int, end: int) -> set[Kind]:
        """Tell which kinds of clusters there are in a range whose entries lie in one slice.

        Raises:
            CorruptImageError: One of the entries is bad.
        """
        layer, geometry = self._layer, self._layer.geometry
        clusters, index = geometry.clusters(end - start), geometry.l2_index(start)
        table, _ = await layer.table_at(geometry.l1_index(start))
        if clusters > _FEW and table:
            part = layer.tables.cached(table, index)
            if part is None:
                part = await layer.tables.load(table, index, L2)
            if part.bad is None:
                # Extents would be as many as clusters where these are scattered.
                first = index % layer.tables.slice_entries
                values = np.frombuffer(part.entries, np.uint64)[first : first + clusters]
                found = ((Kind.DATA, values > ZERO), (Kind.ZERO, values == ZERO))
                return {kind for kind, where in found if where.any()}
        extents = await layer.lookup(start, end - start)
        for extent in extents:
            if extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
        return {extent.kind for extent in extents}

    def _drop(self, part: Slice, start: int, end: int, *, clear: bool) -> None:
        """Take the reference to each data cluster out of a slice; ``clear`` hides no base."""
        geometry, tables = self._layer.geometry, self._layer.tables
        first = geometry.l2_index(start) % tables.slice_entries
        last = first + geometry.clusters(end - start)
        hidden = 0 if clear else geometry.clusters(max(0, min(end, self._reach) - start))
        if last - first > _FEW:
            values = np.array(part.entries[first:last], np.uint64)
            held = values > ZERO
            offsets = values[held]
            # Zero clusters that were there already stay, unless all go.
            values[slice(None) if clear else held] = UNALLOCATED
            values[:hidden][held[:hidden]] = ZERO
            tables.put(part, first, values)
            self._reclaim.retire_all(offsets, part.offset)
            return
        reach = first + hidden
        for index, count, value in list(runs(part.entries, first, last, geometry.cluster_size)):
            if value > ZERO:
                below = max(0, min(count, reach - index))
                tables.fill(part, index, below, ZERO)
                tables.fill(part, index + below, count - below, UNALLOCATED)
                self._reclaim.retire(value, count << geometry.cluster_bits, part.offset)
            elif clear and value == ZERO:
                tables.fill(part, index, count, UNALLOCATED)

    async def _shown(self, start: int, end: int) -> list[int]:
        """List the clusters, by number on the disk, where a base shows through as data."""
        end = min(end, self._reach)
        if start >= end:
            return []
        found: set[int] = set()
        for extent in await self._chain.extents(start, end - start, depth=1):
            if extent.kind is not Kind.ZERO:
                found.update(self._clusters(extent.start, extent.end))
        return [
            cluster
            for extent in await self._layer.lookup(start, end - start)
            if extent.kind is Kind.UNALLOCATED
            for cluster in self._clusters(extent.start, extent.end)
            if cluster in found
        ]

    def _clusters(self, start: int, end: int) -> range:
        """Give the numbers of the clusters that a range of the disk touches."""
        geometry = self._layer.geometry
        return range(start >> geometry.cluster_bits, geometry.clusters(end))
