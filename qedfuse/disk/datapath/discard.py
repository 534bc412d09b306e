"""Deallocating clusters: discards, ranges of zeros, and written clusters of zeros.

A cluster that is deallocated becomes unallocated, or a zero cluster where the base would show
through (S1).  The cluster of the file that held its data goes into quarantine.  Where the range
covers only a part of a cluster, zeros are written, so that the whole range reads as zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.datapath.zerodetection import find_zero_clusters
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.tablecache import L2
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from qedfuse.ondisk.table import runs
from qedfuse.util.pace import Pace

if TYPE_CHECKING:
    from typing import Literal

    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.tablecache import Slice
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.util.backgroundtasks import Progress


_MAX_CLUSTERS_PER_STEP: Final = 1024
"""Clusters that are deallocated before other tasks may run."""

_MAX_CLUSTERS_ONE_BY_ONE: Final = 64
"""Clusters up to this number are handled one by one; for more of them numpy is faster."""


class Discard:
    """Makes ranges of the disk read as zeros, and frees their clusters."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        table_writer: TableWriter,
        write_path: WritePath,
        writeback: MetadataWriteback,
        needcheck: NeedCheck,
        reclaim: Reclaim,
    ) -> None:
        """Deallocate in ``layer``, the top of ``chain``."""
        self._chain = chain
        self._layer = layer
        self._table_writer = table_writer
        self._write_path = write_path
        self._writeback = writeback
        self._needcheck = needcheck
        self._reclaim = reclaim

    async def discard(self, start: int, end: int, *, free: bool = True) -> None:
        """Make a range that lies within the disk read as zeros.

        Args:
            start: Guest offset of the first byte.
            end: Guest offset past the last byte.
            free: Deallocate whole clusters; if not, zeros are written over them.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases parts may read as zeros.
        """
        geometry = self._layer.geometry
        first = geometry.ceil(start)
        # The guest cannot read past the end of the disk, so the last cluster counts as whole.
        last = geometry.ceil(end) if end == self._layer.size else geometry.floor(end)
        if first >= last:
            first = last = min(first, end)
        if start < first:
            await self._write_path.zero_range(start, first)
        if first < last:
            await self._deallocate(first, last, data=free)
        if not free:
            await self._zero_in_place(first, min(last, end))
        if last < end:
            await self._write_path.zero_range(last, end)

    async def drop(self, start: int, end: int, progress: Progress | None = None) -> None:
        """Deallocate whole clusters, and leave unallocated and zero clusters unchanged.

        Unlike `discard` this creates no tables to hide a base where it shows already, and
        also works past the end of the disk.  ``start`` and ``end`` are guest offsets at
        cluster boundaries.  ``progress`` is called with the bytes of the range that are
        done, and with the length of the range.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases a part may have been dropped.
        """
        if start < end:
            await self._deallocate(start, end, data=True, hide=False, progress=progress)

    async def clear(self, start: int, end: int, progress: Progress | None = None) -> None:
        """Make every cluster of a range unallocated, also zero clusters: the base shows everywhere.

        ``start`` and ``end`` are guest offsets at cluster boundaries; ``progress`` is called
        as by `drop`.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases a part may have been cleared.
        """
        if start < end:
            await self._deallocate(start, end, data=True, hide=False, clear=True, progress=progress)

    async def write(self, start: int, data: memoryview, mode: Literal["on", "unmap"]) -> None:
        """Write bytes at a guest offset; whole clusters of zeros take no space (``detect_zeroes``).

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases parts may have been written.
        """
        end, position = start + len(data), start
        for first, last in find_zero_clusters(data, start, self._layer.geometry):
            if position < first:
                await self._write_path.write(position, data[position - start : first - start])
            await self.discard(first, last, free=mode == "unmap")
            position = last
        if position < end:
            await self._write_path.write(position, data[position - start :])

    async def _zero_in_place(self, start: int, end: int) -> None:
        """Write zeros over the allocated clusters of a range, which stay allocated."""
        step = _MAX_CLUSTERS_PER_STEP << self._layer.geometry.cluster_bits
        pace = Pace()
        for at in range(start, end, step):
            for extent in await self._layer.lookup(at, min(step, end - at)):
                if extent.kind is Kind.DATA:
                    await self._write_path.zero_range(extent.start, extent.end, pace)
            await trio.lowlevel.checkpoint()

    async def _deallocate(
        self,
        start: int,
        end: int,
        *,
        data: bool,
        hide: bool = True,
        clear: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Change the entries of whole clusters, slice by slice.

        Args:
            start: Guest offset at a cluster boundary.
            end: Guest offset at a cluster boundary.
            data: Deallocate allocated clusters.
            hide: Turn unallocated clusters into zero clusters where the base has data.
            clear: Make all clusters unallocated, also zero clusters and where the base has data.
            progress: Called as by `drop`.
        """
        geometry = self._layer.geometry
        slice_bytes = self._layer.tables.slice_entries << geometry.cluster_bits
        step = min(slice_bytes, _MAX_CLUSTERS_PER_STEP << geometry.cluster_bits)
        begin = start
        while start < end:
            table, reason = await self._layer.table_at(geometry.l1_index(start))
            if reason:
                raise CorruptImageError(reason)
            if table or (hide and start < self._base_end):
                # A step stays within one slice: slices and tables are multiples of a step.
                stop = min(end, start - start % step + step)
                await self._table_writer.limit_dirty()
                await self._deallocate_in_slice(start, stop, data=data, hide=hide, clear=clear)
            else:
                stop = min(end, (geometry.l1_index(start) + 1) * geometry.table_span)
            start = stop
            if progress is not None:
                progress(start - begin, end - begin)
            await trio.lowlevel.checkpoint()

    @property
    def _base_end(self) -> int:
        """The guest offset from which on no base shows through."""
        return self._chain.layers[1].size if self._chain.has_base else 0

    async def _deallocate_in_slice(
        self, start: int, end: int, *, data: bool, hide: bool, clear: bool
    ) -> None:
        """Do what `_deallocate` does for clusters whose entries lie in one slice."""
        geometry = self._layer.geometry
        async with self._write_path.allocating.hold(start, end):
            shown = await self._clusters_shown(start, end) if hide else []
            kinds = await self._kinds(start, end)
            if not (shown or (data and Kind.DATA in kinds) or (clear and Kind.ZERO in kinds)):
                return
            async with self._needcheck.changing():
                table = await self._table_writer.ensure_table(geometry.l1_index(start))
                index = geometry.l2_index(start)
                slice_ = await self._table_writer.writable_slice(table, index, L2)
                # No await from here on: removing an entry and quarantining its cluster are
                # atomic with respect to other tasks.
                if data:
                    self._drop(slice_, start, end, clear=clear)
                tables = self._layer.tables
                base = index % tables.slice_entries - (start >> geometry.cluster_bits)
                for cluster in shown:
                    if slice_.entries[base + cluster] == UNALLOCATED:
                        tables.fill(slice_, base + cluster, 1, ZERO)
                self._writeback.note_write()

    async def _kinds(self, start: int, end: int) -> set[Kind]:
        """Return the kinds of clusters in a range whose entries lie in one slice.

        Raises:
            CorruptImageError: One of the entries is bad.
        """
        layer, geometry = self._layer, self._layer.geometry
        clusters, index = geometry.clusters(end - start), geometry.l2_index(start)
        table, _ = await layer.table_at(geometry.l1_index(start))
        if clusters > _MAX_CLUSTERS_ONE_BY_ONE and table:
            slice_ = layer.tables.cached(table, index)
            if slice_ is None:
                slice_ = await layer.tables.load(table, index, L2)
            if slice_.bad is None:
                # A lookup would return one extent per cluster where these are scattered.
                first = index % layer.tables.slice_entries
                values = np.frombuffer(slice_.entries, np.uint64)[first : first + clusters]
                found = ((Kind.DATA, values > ZERO), (Kind.ZERO, values == ZERO))
                return {kind for kind, where in found if where.any()}
        extents = await layer.lookup(start, end - start)
        for extent in extents:
            if extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
        return {extent.kind for extent in extents}

    def _drop(self, slice_: Slice, start: int, end: int, *, clear: bool) -> None:
        """Remove the references to the data clusters of a guest range from a slice.

        The clusters become zero clusters as far as a base reaches, and are unallocated past
        that or with ``clear``.
        """
        geometry, tables = self._layer.geometry, self._layer.tables
        first = geometry.l2_index(start) % tables.slice_entries
        last = first + geometry.clusters(end - start)
        hidden = 0 if clear else geometry.clusters(max(0, min(end, self._base_end) - start))
        if last - first > _MAX_CLUSTERS_ONE_BY_ONE:
            values = np.array(slice_.entries[first:last], np.uint64)
            is_data = values > ZERO
            offsets = values[is_data]
            # Existing zero clusters stay, unless ``clear`` removes them too.
            values[slice(None) if clear else is_data] = UNALLOCATED
            values[:hidden][is_data[:hidden]] = ZERO
            tables.put(slice_, first, values)
            self._reclaim.retire_all(offsets, slice_.offset)
            return
        hidden_end = first + hidden
        for index, count, value in list(runs(slice_.entries, first, last, geometry.cluster_size)):
            if value > ZERO:
                zeros = max(0, min(count, hidden_end - index))
                tables.fill(slice_, index, zeros, ZERO)
                tables.fill(slice_, index + zeros, count - zeros, UNALLOCATED)
                self._reclaim.retire(value, count << geometry.cluster_bits, slice_.offset)
            elif clear and value == ZERO:
                tables.fill(slice_, index, count, UNALLOCATED)

    async def _clusters_shown(self, start: int, end: int) -> list[int]:
        """Return the numbers of the unallocated clusters where a base shows through as data."""
        end = min(end, self._base_end)
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
        """Return the numbers of the clusters that a range of the disk touches."""
        geometry = self._layer.geometry
        return range(start >> geometry.cluster_bits, geometry.clusters(end))
