"""What a guest's request does: cut into runs, each run read, overwritten or allocated.

Writes in place need no lock: two of them to the same bytes may end in either order, as
on any disk.  They are counted instead (`Epochs`), so that the clusters they write to are
not used again under them.  What gives clusters a place, or takes it away, holds its
guest clusters in a range lock and looks again once it has it, so that of two writes into
one new cluster the second finds the cluster there and writes in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.tablecache import L1, L2, Pins
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.constants import ZERO
from qedfuse.util.pace import Pace
from qedfuse.util.rangelock import RangeLock

if TYPE_CHECKING:
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.tablecache import Slice
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.space.epochs import Epochs
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_COPY_BYTES: Final = 1 << 20
"""Most that is copied at once around a guest's data, in bytes."""

_ALLOCATE_BYTES: Final = 1 << 26
"""How much is given a place in one step when no data is written, in bytes."""
_ALLOCATE_CLUSTERS: Final = 1024
"""The same in clusters, at most: so many scattered ones are looked up in a millisecond."""


class WritePath:
    """Carries out writes on the top image of a chain."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        space: SpaceManager,
        writeback: MetadataWriteback,
        flusher: Flusher,
        needcheck: NeedCheck,
        epochs: Epochs,
        dirty_budget: int,
    ) -> None:
        """Write to ``layer``, the top of ``chain``; ``dirty_budget`` is in bytes (D4)."""
        self._chain = chain
        self._epochs = epochs
        self._layer = layer
        self._space = space
        self._writeback = writeback
        self._flusher = flusher
        self._needcheck = needcheck
        self._dirty_budget = dirty_budget
        self.allocating = RangeLock()
        self._making_table = trio.Lock()

    async def write(self, start: int, data: memoryview) -> None:
        """Write bytes that lie within the disk.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  In both cases parts may have been written.
        """
        new = []
        turn = self._epochs.enter()
        try:
            for extent in await self._layer.lookup(start, len(data)):
                if extent.kind is Kind.DATA or extent.kind is Kind.BAD:
                    await self._in_place(extent, data[extent.start - start : extent.end - start])
                else:
                    new.append(extent)
        finally:
            # Who waits for free clusters may wait for us, so this ends before allocating.
            self._epochs.leave(turn)
        for extent in new:
            part = data[extent.start - start : extent.end - start]
            await self._allocate(extent.start, extent.end, part)

    async def _in_place(self, extent: Extent, data: memoryview) -> None:
        """Overwrite what is there already."""
        if extent.kind is Kind.BAD:
            raise CorruptImageError(extent.reason)
        await self._layer.file.pwrite(extent.file_offset, data)
        self._writeback.note_write()

    async def _allocate(self, start: int, end: int, data: memoryview) -> None:
        """Write to clusters that had no place in the file when we looked.

        ``data`` may be empty: then the clusters are given a place and keep their content.
        """
        geometry = self._layer.geometry
        await self.wait_for_tables()
        async with self.allocating.hold(geometry.floor(start), geometry.ceil(end)):
            for extent in await self._layer.lookup(start, end - start):
                part = data[extent.start - start : extent.end - start]
                if extent.kind is Kind.DATA or extent.kind is Kind.BAD:
                    await self._in_place(extent, part)
                else:
                    async with self._needcheck.changing():
                        await self._into_new(extent, part)

    async def wait_for_tables(self) -> None:
        """Write tables back if too many have changed (D4).

        Called before anything is allocated: memory stays bounded, and if the tables
        cannot be written a request is refused instead of piling up.

        Raises:
            HostError: They cannot be written.
        """
        if self._layer.tables.dirty_bytes > self._dirty_budget:
            await self._flusher.flush()

    async def _into_new(self, extent: Extent, data: memoryview) -> None:
        """Give every cluster of an extent a place; the caller holds its guest clusters."""
        geometry = self._layer.geometry
        start = extent.start
        while start < extent.end:
            table = await self.table_for(geometry.l1_index(start))
            table_end = (geometry.l1_index(start) + 1) * geometry.table_span
            stop = min(extent.end, table_end)
            first = geometry.floor(start)
            run = await self._space.allocate(geometry.clusters(stop - first))
            stop = min(stop, first + run.length)
            part = data[start - extent.start : stop - extent.start]
            try:
                await self._fill(extent.kind, run, first, start, part)
                await self._point(table, first, run)
            except BaseException:
                self._space.release(run)
                raise
            start = stop

    async def _fill(self, kind: Kind, run: Run, first: int, start: int, data: memoryview) -> None:
        """Write new clusters whole: the guest's data, and around it what was there before.

        ``first`` is the guest offset of the run, ``start`` that of the data.
        """
        end = start + len(data)
        run_end = first + run.length
        # A zero cluster hides the base: around the data there must be zeros, not what
        # the base has there (QEMU's driver gets this wrong).
        from_base = kind is Kind.UNALLOCATED and self._chain.has_base
        pwrite = self._layer.file.pwrite
        if run.never_written and not from_base:
            await pwrite(run.offset + start - first, data)
        elif run.length <= _COPY_BYTES:
            head = await self._before(first, start, from_base=from_base)
            tail = await self._before(end, run_end, from_base=from_base)
            await pwrite(run.offset, head, data, tail)
        else:
            # A cluster can be 64 MiB long: copy in steps, or a few small writes at once
            # would take gigabytes of memory.
            await pwrite(run.offset + start - first, data)
            for begin, stop in ((first, start), (end, run_end)):
                for at in range(begin, stop, _COPY_BYTES):
                    upto = min(stop, at + _COPY_BYTES)
                    part = await self._before(at, upto, from_base=from_base)
                    await pwrite(run.offset + at - first, part)

    async def _before(self, start: int, end: int, *, from_base: bool) -> bytes | bytearray:
        """Read what a range held before it had a place: the base's bytes, or zeros."""
        # Past the disk's end the base must not be copied: if the disk grew one day, it
        # would show there instead of zeros.
        inside = max(0, min(end, self._layer.size) - start) if from_base else 0
        data = await self._chain.read(start, inside, depth=1)
        return data if start + inside == end else bytes(data) + bytes(end - start - inside)

    async def table_for(self, l1_index: int) -> int:
        """Give the file offset of the L2 table for an L1 entry, made new if there is none."""
        layer = self._layer
        table, reason = await layer.table_at(l1_index)
        if reason:
            raise CorruptImageError(reason)
        if table:
            return table
        async with self._making_table:
            table, _ = await layer.table_at(l1_index)
            if table:
                return table
            run = await self._space.allocate_table()
            try:
                for offset in (
                    range(run.offset, run.end, _COPY_BYTES) if not run.never_written else ()
                ):
                    size = min(_COPY_BYTES, run.end - offset)
                    await layer.file.pwrite(offset, bytes(size))
                part = await self.writable_slice(layer.header.l1_table_offset, l1_index, L1)
            except BaseException:
                self._space.release(run)
                raise
            layer.tables.set(part, l1_index % layer.tables.slice_entries, run.offset)
            layer.registry.add(l1_index, run.offset)
            self._writeback.note_write()
            return run.offset

    async def writable_slice(self, table: int, index: int, level: int) -> Slice:
        """Return the slice with an entry, with host space reserved for its write-back.

        The caller changes it before it awaits anything, or pins it.

        Raises:
            HostError: The slice cannot be read, or the host is full.
        """
        tables = self._layer.tables
        part = await tables.load(table, index, level)
        with Pins(part):
            await tables.reserve(part)
        return part

    async def _point(self, table: int, first: int, run: Run) -> None:
        """Make a table's entries point to a run, from guest offset ``first`` on."""
        geometry = self._layer.geometry
        tables = self._layer.tables
        index = geometry.l2_index(first)
        end = index + (run.length >> geometry.cluster_bits)
        offset = run.offset
        # All slices are brought in before the first entry is changed: what fails here
        # fails while nothing refers to the run yet.
        step = tables.slice_entries
        parts = []
        with Pins() as pins:
            for at in range(index - index % step, end, step):
                part = await self.writable_slice(table, at, L2)
                # The next load must not evict it.
                pins.add(part)
                parts.append(part)
            for part in parts:
                for place in range(
                    index % step, min(len(part.entries), index % step + end - index)
                ):
                    tables.set(part, place, offset)
                    offset += geometry.cluster_size
                    index += 1
            self._writeback.note_write()

    async def allocate(self, start: int, end: int) -> None:
        """Give each cluster of a range a place, and room on the host; the content stays.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused; parts may have a place now.
        """
        geometry = self._layer.geometry
        most = min(_ALLOCATE_BYTES, _ALLOCATE_CLUSTERS * geometry.cluster_size)
        step = max(most, geometry.cluster_size)
        pace = Pace()
        for at in range(geometry.floor(start), end, step):
            stop = min(end, at + step)
            for extent in await self._layer.lookup(max(start, at), stop - max(start, at)):
                if extent.kind is not Kind.DATA:
                    await self._allocate(extent.start, extent.end, memoryview(b""))
                    await pace.step()
            turn = self._epochs.enter()
            try:
                for extent in await self._layer.lookup(max(start, at), stop - max(start, at)):
                    if extent.kind is Kind.DATA:
                        await self._layer.file.reserve(extent.file_offset, extent.length)
                        await pace.step()
            finally:
                self._epochs.leave(turn)

    async def blank(self, start: int, end: int, pace: Pace | None = None) -> None:
        """Write zeros over a range, where it does not read as zeros anyway.

        ``pace`` is that of the work of which this is a part.
        """
        pace = pace or Pace()
        zeros = memoryview(bytes(min(end - start, _COPY_BYTES)))
        for extent in await self._layer.lookup(start, end - start):
            if extent.kind is Kind.UNALLOCATED and self._chain.has_base:
                below = await self._chain.extents(extent.start, extent.length, depth=1)
                shown = any(part.kind is not Kind.ZERO for part in below)
            else:
                shown = extent.kind is Kind.DATA or extent.kind is Kind.BAD
            if shown:
                for at in range(extent.start, extent.end, _COPY_BYTES):
                    await self.write(at, zeros[: extent.end - at])
                    await pace.step()

    async def write_zero_clusters(self, start: int, end: int) -> None:
        """Turn unallocated clusters from ``start`` to ``end`` into zero clusters.

        Both are guest offsets at cluster boundaries; used where a base would show
        through.  The clusters that have a place in the file stay as they are.
        """
        geometry = self._layer.geometry
        tables = self._layer.tables
        async with self.allocating.hold(start, end), self._needcheck.changing():
            while start < end:
                table = await self.table_for(geometry.l1_index(start))
                index = geometry.l2_index(start)
                part = await self.writable_slice(table, index, L2)
                at = index % tables.slice_entries
                stop = min(at + geometry.clusters(end - start), len(part.entries))
                for place in range(at, stop):
                    if not part.entries[place]:
                        tables.set(part, place, ZERO)
                self._writeback.note_write()
                start += (stop - at) * geometry.cluster_size
                await self.wait_for_tables()
                await trio.lowlevel.checkpoint()

    def is_free(self, start: int, end: int) -> bool:
        """Tell whether clusters may be allocated at once, from ``start`` to ``end``.

        Nobody may be just giving them a place or taking it away, and there may not be
        too many changed tables (see `wait_for_tables`).
        """
        return self.allocating.is_free(start, end) and (
            self._layer.tables.dirty_bytes <= self._dirty_budget
        )

    def waiting(self) -> int:
        """Tell how many writes wait for another one into the same new cluster."""
        return self.allocating.statistics().waiting
