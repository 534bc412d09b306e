"""The write path: a write is cut into extents, and each is overwritten or allocated.

Overwrites in place need no lock, because two overwrites of the same bytes may end in either
order, as on any disk.  An overwrite enters an epoch (`Epochs`), so that its clusters are not
reused before it ends.

A task that allocates or deallocates guest clusters takes a range lock on them, and repeats the
lookup under the lock.  So of two concurrent writes into one new cluster the second finds the
cluster allocated, and overwrites it.  This overwrite needs no epoch, because no other task can
deallocate the cluster while the lock is held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.datapath.basecontent import BaseContent
from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.slices import L2
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.constants import ZERO
from qedfuse.util.pace import Pace
from qedfuse.util.rangelock import RangeLock

if TYPE_CHECKING:
    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.datapath.zerofill import ZeroFill
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.space.epochs import Epochs
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_MAX_COPY_BYTES: Final = 1 << 20
"""Maximum bytes of one read or write that copies the content around a write into new clusters, or
zeroes a range."""

_MAX_BYTES_PER_LOOKUP: Final = 1 << 26
"""Maximum bytes of the disk in one lookup by `WritePath.allocate`."""
_MAX_CLUSTERS_PER_LOOKUP: Final = 1024
"""Maximum number of clusters in one lookup by `WritePath.allocate`, so that it takes about 1 ms."""


class WritePath:
    """Carries out writes on the top image of a chain.

    Attributes:
        allocation_lock: Held on a range of guest offsets while its clusters are allocated or
            deallocated.
    """

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        space: SpaceManager,
        table_writer: TableWriter,
        writeback: MetadataWriteback,
        needcheck: NeedCheck,
        epochs: Epochs,
        zero_fill: ZeroFill,
    ) -> None:
        """Prepare to write to ``layer``, the top of ``chain``."""
        self._zero_fill = zero_fill
        self._chain = chain
        self._base_content = BaseContent(chain)
        self._epochs = epochs
        self._layer = layer
        self._space = space
        self._table_writer = table_writer
        self._writeback = writeback
        self._needcheck = needcheck
        self.allocation_lock = RangeLock()

    async def write(self, start: int, data: memoryview) -> None:
        """Write ``data`` at a guest offset.

        The range may reach past the end of the disk, but only up to the end of the last cluster.
        After an error, parts of the range may have been written.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: A system call failed.
            ReadOnlyError: The disk has become read-only during the call.
        """
        new = []
        epoch = self._epochs.enter()
        try:
            for extent in await self._layer.lookup(start, len(data)):
                if extent.kind is Kind.DATA or extent.kind is Kind.BAD:
                    await self._overwrite(extent, data[extent.start - start : extent.end - start])
                else:
                    new.append(extent)
        finally:
            # Allocating may wait until all requests of this epoch have ended: a deadlock, if this
            # request did not leave it.
            self._epochs.leave(epoch)
        for extent in new:
            segment = data[extent.start - start : extent.end - start]
            await self._write_to_new(extent.start, extent.end, segment)

    async def _overwrite(self, extent: Extent, data: memoryview) -> None:
        """Overwrite an extent of data in place; raise CorruptImageError for a bad extent."""
        if extent.kind is Kind.BAD:
            raise CorruptImageError(extent.reason)
        await self._layer.file.pwrite(extent.file_offset, data)
        self._writeback.note_write()

    async def _write_to_new(self, start: int, end: int, data: memoryview) -> None:
        """Write to a guest range that was found without data; empty ``data`` only allocates it."""
        geometry = self._layer.geometry
        await self._table_writer.limit_dirty()
        async with self.allocation_lock.hold(geometry.floor(start), geometry.ceil(end)):
            for extent in await self._layer.lookup(start, end - start):
                segment = data[extent.start - start : extent.end - start]
                if extent.kind is Kind.DATA or extent.kind is Kind.BAD:
                    await self._overwrite(extent, segment)
                else:
                    async with self._needcheck.changing():
                        await self._allocate_extent(extent, segment)

    async def _allocate_extent(self, extent: Extent, data: memoryview) -> None:
        """Allocate and fill the clusters of an extent without data; the caller locks the range."""
        geometry = self._layer.geometry
        start = extent.start
        while start < extent.end:
            table = await self._table_writer.ensure_table(geometry.l1_index(start))
            table_end = (geometry.l1_index(start) + 1) * geometry.table_span
            stop = min(extent.end, table_end)
            first = geometry.floor(start)
            run = await self._space.allocate(geometry.clusters(stop - first))
            stop = min(stop, first + run.length)
            segment = data[start - extent.start : stop - extent.start]
            try:
                await self._fill(extent.kind, run, first, start, segment)
                await self._table_writer.point_to(table, first, run)
            except BaseException:
                self._space.release(run)
                raise
            start = stop

    async def _fill(self, kind: Kind, run: Run, first: int, start: int, data: memoryview) -> None:
        """Write the guest's data to new clusters, and the previous content around the data.

        ``kind`` is that of the guest clusters before the write.  ``first`` and ``start`` are the
        guest offsets of the first cluster and of ``data``.
        """
        end = start + len(data)
        run_end = first + run.length
        # A zero cluster hides the base, so the bytes around the data must be zeros.
        from_base = kind is Kind.UNALLOCATED and self._chain.has_base
        pwrite = self._layer.file.pwrite
        offset_in_run = start - first
        if run.never_written and not from_base:
            await pwrite(run.offset + offset_in_run, data)
            self._zero_fill.fill_rest(run, offset_in_run, len(data))
        elif run.length <= _MAX_COPY_BYTES:
            head = await self._previous_content(first, start, from_base=from_base)
            tail = await self._previous_content(end, run_end, from_base=from_base)
            await pwrite(run.offset, head, data, tail)
        else:
            # Copied in steps to save memory: a cluster can be 64 MiB long, and writes run
            # concurrently.
            await pwrite(run.offset + offset_in_run, data)
            pace = Pace()
            for begin, stop in ((first, start), (end, run_end)):
                for at in range(begin, stop, _MAX_COPY_BYTES):
                    part_end = min(stop, at + _MAX_COPY_BYTES)
                    content = await self._previous_content(at, part_end, from_base=from_base)
                    await pwrite(run.offset + at - first, content)
                    await pace.step()

    async def _previous_content(
        self, start: int, end: int, *, from_base: bool
    ) -> bytes | bytearray:
        """Return the bytes of the base for a guest range; zeros if ``from_base`` is False."""
        # Past the end of the disk zeros replace the base.  Otherwise the guest could read bytes of
        # the base there after another program has grown the disk.
        base_bytes = max(0, min(end, self._layer.size) - start) if from_base else 0
        data = await self._base_content.read(start, base_bytes)
        return data if start + base_bytes == end else bytes(data) + bytes(end - start - base_bytes)

    async def allocate(self, start: int, end: int) -> None:
        """Allocate each cluster of a guest range, and reserve host space for it.

        The range reads as before.  After an error, some clusters may have been allocated.
        """
        geometry = self._layer.geometry
        max_lookup_bytes = min(
            _MAX_BYTES_PER_LOOKUP, _MAX_CLUSTERS_PER_LOOKUP * geometry.cluster_size
        )
        step = max(max_lookup_bytes, geometry.cluster_size)
        pace = Pace()
        for at in range(geometry.floor(start), end, step):
            stop = min(end, at + step)
            for extent in await self._layer.lookup(max(start, at), stop - max(start, at)):
                if extent.kind is not Kind.DATA:
                    await self._write_to_new(extent.start, extent.end, memoryview(b""))
                    await pace.step()
            # Host space must be reserved for new and old clusters alike, so look up again.  The
            # epoch keeps the clusters from being reused before their space is reserved.
            epoch = self._epochs.enter()
            try:
                for extent in await self._layer.lookup(max(start, at), stop - max(start, at)):
                    if extent.kind is Kind.DATA:
                        await self._layer.file.reserve(extent.file_offset, extent.length)
                        await pace.step()
            finally:
                self._epochs.leave(epoch)

    async def zero_range(self, start: int, end: int, pace: Pace | None = None) -> None:
        """Write zeros over those extents of a guest range that are not known to read as zeros.

        As for `write`, the range may reach up to the end of the last cluster of the disk.  ``pace``
        decides when other tasks run; a caller that zeroes many ranges passes the same one.  After
        an error, parts of the range may have been zeroed.
        """
        pace = pace or Pace()
        zeros = memoryview(bytes(min(end - start, _MAX_COPY_BYTES)))
        for extent in await self._layer.lookup(start, end - start):
            if extent.kind is Kind.UNALLOCATED and self._chain.has_base:
                below = await self._chain.extents(extent.start, extent.length, depth=1)
                has_data = any(shown.kind is not Kind.ZERO for shown in below)
            else:
                has_data = extent.kind is Kind.DATA or extent.kind is Kind.BAD
            if has_data:
                for at in range(extent.start, extent.end, _MAX_COPY_BYTES):
                    await self.write(at, zeros[: extent.end - at])
                    await pace.step()

    async def write_zero_clusters(self, start: int, end: int) -> None:
        """Turn the unallocated clusters of a guest range into zero clusters, which hide the base.

        ``start`` and ``end`` must be at cluster boundaries.  After an error, some clusters may be
        zero clusters already.

        Raises:
            CorruptImageError: An L1 entry is bad.
            HostError: A system call failed.
            ReadOnlyError: The disk has become read-only during the call.
        """
        geometry = self._layer.geometry
        tables = self._layer.tables
        async with self.allocation_lock.hold(start, end), self._needcheck.changing():
            while start < end:
                table = await self._table_writer.ensure_table(geometry.l1_index(start))
                index = geometry.l2_index(start)
                slice_ = await self._table_writer.writable_slice(table, index, L2)
                first = index % tables.slice_entries
                stop = min(first + geometry.clusters(end - start), len(slice_.entries))
                for at in range(first, stop):
                    if not slice_.entries[at]:
                        tables.set(slice_, at, ZERO)
                self._writeback.note_write()
                start += (stop - first) * geometry.cluster_size
                await self._table_writer.limit_dirty()
                await trio.lowlevel.checkpoint()
