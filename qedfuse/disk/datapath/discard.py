"""Deallocating clusters: for discards, and for ranges or clusters that become zeros.

A guest cluster that is discarded becomes unallocated, or a zero cluster where the base would show
through (S1 in docs/space.md).  If a discard covers only a part of a cluster, zeros are written to
that part.  A commit, which wants the base to show through, makes clusters unallocated in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.datapath.zerodetection import find_zero_clusters
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.slices import L2
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
    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.util.backgroundtasks import Progress


_MAX_CLUSTERS_PER_STEP: Final = 1024
"""Maximum number of clusters that are deallocated before other tasks run."""

_MAX_CLUSTERS_ONE_BY_ONE: Final = 64
"""Maximum number of entries that are processed one by one; for more entries numpy is faster."""


class Discard:
    """Deallocates clusters of the disk, or writes zeros to them.

    The methods raise HostError if a system call fails, CorruptImageError for a bad table entry, and
    ReadOnlyError if the disk has become read-only.  After an error a part of the range may have
    been changed.
    """

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
        """Deallocate clusters of ``layer``, the top of ``chain``."""
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
            free: Whether to deallocate allocated clusters.  If False, zeros are written over them.
        """
        geometry = self._layer.geometry
        first = geometry.ceil(start)
        # The guest cannot read past the end of the disk.  So a range that reaches the end covers
        # the whole last cluster.
        last = geometry.ceil(end) if end == self._layer.size else geometry.floor(end)
        if first >= last:
            # The range covers no whole cluster, so nothing is deallocated.  It is zeroed in two
            # parts if it crosses a cluster boundary.
            first = last = min(first, end)
        if start < first:
            await self._write_path.zero_range(start, first)
        if first < last:
            await self._deallocate(first, last, free_data=free)
        if not free:
            await self._zero_in_place(first, min(last, end))
        if last < end:
            await self._write_path.zero_range(last, end)

    async def drop(self, start: int, end: int, progress: Progress | None = None) -> None:
        """Deallocate the data clusters of a range; leave unallocated and zero clusters unchanged.

        Unlike `discard`, this method also works past the end of the disk.

        Args:
            start: Guest offset at a cluster boundary.
            end: Guest offset at a cluster boundary.
            progress: Called with the number of bytes that are done, and the length of the range.
        """
        if start < end:
            await self._deallocate(
                start, end, free_data=True, zero_unallocated=False, progress=progress
            )

    async def clear(self, start: int, end: int, progress: Progress | None = None) -> None:
        """Make all clusters of a range unallocated, even zero clusters, so that the base shows.

        Args:
            start: Guest offset at a cluster boundary.
            end: Guest offset at a cluster boundary.
            progress: Called with the number of bytes that are done, and the length of the range.
        """
        if start < end:
            await self._deallocate(
                start,
                end,
                free_data=True,
                zero_unallocated=False,
                show_base=True,
                progress=progress,
            )

    async def write(self, start: int, data: memoryview, mode: Literal["on", "unmap"]) -> None:
        """Write ``data`` at a guest offset; whole clusters of zeros take no new space.

        Args:
            start: Guest offset of ``data``.
            data: The bytes to write; the range must lie within the disk.
            mode: The value of ``detect_zeroes``.  It matters for an allocated cluster that ``data``
                covers with zeros: ``unmap`` deallocates the cluster, and ``on`` overwrites it.
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
        """Write zeros over the allocated clusters of a range; they stay allocated."""
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
        free_data: bool,
        zero_unallocated: bool = True,
        show_base: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Deallocate the clusters of a guest range, slice by slice.

        Args:
            start: Guest offset at a cluster boundary.
            end: Guest offset at a cluster boundary.
            free_data: Whether to deallocate allocated clusters.
            zero_unallocated: Whether an unallocated cluster over data of the base becomes a zero
                cluster.
            show_base: Whether to make all clusters unallocated.  Requires ``free_data``.
            progress: Called with the number of bytes that are done, and the length of the range.
        """
        geometry = self._layer.geometry
        slice_bytes = self._layer.tables.slice_entries << geometry.cluster_bits
        step = min(slice_bytes, _MAX_CLUSTERS_PER_STEP << geometry.cluster_bits)
        begin = start
        while start < end:
            table, reason = await self._layer.table_at(geometry.l1_index(start))
            if reason:
                raise CorruptImageError(reason)
            if table or (zero_unallocated and start < self._base_end):
                stop = min(end, start - start % step + step)
                await self._table_writer.limit_dirty()
                await self._deallocate_in_slice(
                    start,
                    stop,
                    free_data=free_data,
                    zero_unallocated=zero_unallocated,
                    show_base=show_base,
                )
            else:
                stop = min(end, (geometry.l1_index(start) + 1) * geometry.table_span)
            start = stop
            if progress is not None:
                progress(start - begin, end - begin)
            await trio.lowlevel.checkpoint()

    @property
    def _base_end(self) -> int:
        """The guest offset at which the base ends; 0 without a base."""
        return self._chain.layers[1].size if self._chain.has_base else 0

    async def _deallocate_in_slice(
        self, start: int, end: int, *, free_data: bool, zero_unallocated: bool, show_base: bool
    ) -> None:
        """Deallocate clusters whose entries lie in one slice; see `_deallocate`."""
        geometry = self._layer.geometry
        async with self._write_path.allocation_lock.hold(start, end):
            base_data_clusters = (
                await self._base_data_clusters(start, end) if zero_unallocated else []
            )
            kinds = await self._kinds(start, end)
            if not (
                base_data_clusters
                or (free_data and Kind.DATA in kinds)
                or (show_base and Kind.ZERO in kinds)
            ):
                return
            async with self._needcheck.changing():
                table = await self._table_writer.ensure_table(geometry.l1_index(start))
                index = geometry.l2_index(start)
                slice_ = await self._table_writer.writable_slice(table, index, L2)
                # No await from here on: to other tasks, removing an entry and putting its cluster
                # into quarantine must be one step.
                if free_data:
                    self._drop(slice_, start, end, show_base=show_base)
                tables = self._layer.tables
                # The difference between an index in the slice and the guest cluster's number.
                delta = index % tables.slice_entries - (start >> geometry.cluster_bits)
                for cluster in base_data_clusters:
                    if slice_.entries[cluster + delta] == UNALLOCATED:
                        tables.fill(slice_, cluster + delta, 1, ZERO)
                self._writeback.note_write()

    async def _kinds(self, start: int, end: int) -> set[Kind]:
        """Return which kinds of clusters a guest range has; its entries must lie in one slice.

        `Kind.UNALLOCATED` may be missing in the result, even if some clusters are unallocated.
        """
        layer, geometry = self._layer, self._layer.geometry
        clusters, index = geometry.clusters(end - start), geometry.l2_index(start)
        table, _ = await layer.table_at(geometry.l1_index(start))
        if clusters > _MAX_CLUSTERS_ONE_BY_ONE and table:
            slice_ = layer.tables.cached(table, index)
            if slice_ is None:
                slice_ = await layer.tables.load(table, index, L2)
            if slice_.bad is None:
                first = index % layer.tables.slice_entries
                values = np.frombuffer(slice_.entries, np.uint64)[first : first + clusters]
                found = ((Kind.DATA, values > ZERO), (Kind.ZERO, values == ZERO))
                return {kind for kind, where in found if where.any()}
        extents = await layer.lookup(start, end - start)
        for extent in extents:
            if extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
        return {extent.kind for extent in extents}

    def _drop(self, slice_: Slice, start: int, end: int, *, show_base: bool) -> None:
        """Remove from a slice the references to the data clusters of a guest range.

        The clusters of the file go into quarantine.  The guest clusters that had data become zero
        clusters up to the end of the base, and unallocated past it.  With ``show_base`` all guest
        clusters of the range become unallocated.
        """
        geometry, tables = self._layer.geometry, self._layer.tables
        first = geometry.l2_index(start) % tables.slice_entries
        last = first + geometry.clusters(end - start)
        # The number of clusters that lie over the base, at the beginning of the range.  Those that
        # lose their data become zero clusters.
        hidden = 0 if show_base else geometry.clusters(max(0, min(end, self._base_end) - start))
        if last - first > _MAX_CLUSTERS_ONE_BY_ONE:
            values = np.array(slice_.entries[first:last], np.uint64)
            is_data = values > ZERO
            offsets = values[is_data]
            # Zero clusters stay zero clusters, except with ``show_base``.
            values[slice(None) if show_base else is_data] = UNALLOCATED
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
            elif show_base and value == ZERO:
                tables.fill(slice_, index, count, UNALLOCATED)

    async def _base_data_clusters(self, start: int, end: int) -> list[int]:
        """Return the numbers of the unallocated clusters of a range where the base has data.

        A bad entry of the base counts as data.
        """
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
        """Return the numbers of the guest clusters that a guest range touches."""
        geometry = self._layer.geometry
        return range(start >> geometry.cluster_bits, geometry.clusters(end))
