"""Changing the size of the disk.

Growing: the added range reads as zeros, whatever a base or the file holds there.  The
changes that ensure this are durable before the new size is.

Shrinking has three steps: entries of the range that is cut off are dropped, then the size
changes, and then the tables past the new end are removed.  Each step is durable before the
next.  After a crash before the second step the disk has its old size, and the last range
reads as zeros where it held data: the user has asked to lose that data, and the image is
sound.  In the other order a crash would leave entries past the end of the disk.  A program
that later grows the disk without looking for them would show the old data there.  Tables
are removed last, because without them an overlay would show its base's data meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.tablecache import L1
from qedfuse.errors import CorruptImageError, UsageError
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES, SECTOR, UNALLOCATED
from qedfuse.util.backgroundtasks import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.datapath.discard import Discard
    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback

    Progress = Callable[[int, int], None]

_COMPARE_CHUNK_BYTES: Final = 1 << 20
"""Most bytes that are read in one call to see whether they are zeros."""

_MAX_CLUSTERS_PER_LOOKUP: Final = 1024
"""Clusters of a table that are looked up before other tasks may run."""


class Resize:
    """Changes the size of a disk.

    Attributes:
        lock: Held while the size changes, and by tasks that need the size to stay.
    """

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        table_writer: TableWriter,
        write_path: WritePath,
        writeback: MetadataWriteback,
        flusher: Flusher,
        header_store: HeaderStore,
        allocator: Allocator,
        discards: Discard,
        needcheck: NeedCheck,
        reclaim: Reclaim,
    ) -> None:
        """Resize ``layer``, the top of ``chain``."""
        self._chain = chain
        self._layer = layer
        self._table_writer = table_writer
        self._write_path = write_path
        self._writeback = writeback
        self._flusher = flusher
        self._header_store = header_store
        self._allocator = allocator
        self._discards = discards
        self._needcheck = needcheck
        self._reclaim = reclaim
        self.lock = trio.Lock()

    def check(self, size: int, *, shrink: bool = False) -> None:
        """Raise if the disk cannot have a size in bytes.

        Raises:
            UsageError: The disk would shrink, or grow with ``shrink``, or its tables cannot
                address that much.
        """
        name, old, most = (
            self._layer.file.name,
            self._layer.size,
            self._layer.geometry.max_image_size,
        )
        if shrink and size > old:
            msg = f"{name}: size: found {size}, expected at most {old}: no growing"
            raise UsageError(msg)
        if size < old and not shrink:
            msg = f"{name}: size: found {size}, expected at least {old}: no shrinking"
            raise UsageError(msg)
        if size % SECTOR or not 0 <= size <= most:
            msg = f"{name}: size: found {size}, expected a multiple of {SECTOR} up to {most}"
            raise UsageError(msg)

    async def resize(self, size: int, *, force: bool = False) -> None:
        """Grow the disk to a size that `check` has accepted, durably.

        With ``force`` clusters that entries past the old end refer to are deallocated.

        Raises:
            CorruptImageError: Table entries past the end are in use.
            HostError: The host refused; the disk has its old size.
        """
        async with self.lock:
            if size <= self._layer.size:
                return
            await self._zero_past_end(size, force=force)
            # The zeros and the entries that hide the base must be durable before the size.
            await self._writeback.barrier()
            await self._set_size(size)

    async def _set_size(self, size: int) -> None:
        """Write the size into the header, durably, and use it from then on.

        Raises:
            HostError: The host refused; the disk has its old size.
        """
        await self._header_store.change(
            lambda header: header.with_size(size), barrier=self._writeback.barrier
        )
        self._layer.set_header(self._header_store.value)
        self._allocator.set_size(self._header_store.value)

    async def _zero_past_end(self, size: int, *, force: bool) -> None:
        """Make the range from the disk's end to ``size`` read as zeros once the disk grows.

        The last cluster may hold bytes past the end of the disk, and a base that is longer
        than the disk would show through after it.

        Raises:
            CorruptImageError: Table entries past the end are in use.
        """
        geometry = self._layer.geometry
        old, past = self._layer.size, geometry.ceil(self._layer.size)
        base_end = max((base.size for base in self._chain.layers[1:]), default=0)
        if past < size:
            extent = await self._first_in_use(past, size)
            if extent is not None and force and extent.kind is Kind.DATA:
                await self._discards.drop(past, geometry.ceil(size))
            elif extent is not None:
                cure = "must be repaired" if extent.kind is Kind.BAD else "takes force to drop them"
                msg = (
                    f"{self._layer.file.name}: resize: found table entries for "
                    f"{extent.start}, past the end of the disk at {old}, expected none: the "
                    f"image {cure} first"
                )
                raise CorruptImageError(msg)
        if old < past:
            await self._write_path.zero_range(old, min(past, size))
        if past < min(size, base_end):
            await self._write_path.write_zero_clusters(past, geometry.ceil(min(size, base_end)))

    async def shrink(self, size: int, progress: Progress | None = None) -> None:
        """Shrink the disk to a size that `check` has accepted, durably.

        ``progress`` is called with how much work is done and how much there is, in any unit.

        Raises:
            CorruptImageError: A table entry for the range that is cut off is bad.
            HostError: The host refused; the disk has its old size or the new one.
        """
        geometry = self._layer.geometry
        async with self.lock:
            old = self._layer.size
            # Bytes past the end in the last cluster would show again if the disk grew.
            last = await self._first_in_use(size, min(old, geometry.ceil(size)))
            if last is not None:
                await self._write_path.zero_range(last.start, last.end)
            await self._discards.drop(geometry.ceil(size), geometry.ceil(old), _half(progress))
            async with periodic_progress(self._giving_back(progress)):
                await self._writeback.barrier()
                if size < old:
                    await self._set_size(size)
                await self._drop_tables(geometry.l1_used(size))
                await self._flusher.flush()

    async def empty(self, progress: Progress | None = None) -> None:
        """Deallocate all clusters and remove all tables, so that the disk shows only its base.

        Tables are removed last, as by `shrink`; ``progress`` is called as by `shrink`.

        Raises:
            CorruptImageError: A table entry is bad.
            HostError: The host refused; a part may have been deallocated.
        """
        async with self.lock:
            end = self._layer.geometry.ceil(self._layer.size)
            await self._discards.clear(0, end, _half(progress))
            async with periodic_progress(self._giving_back(progress)):
                await self._writeback.barrier()
                await self._drop_tables(0)
                await self._flusher.flush()

    def _giving_back(self, progress: Progress | None) -> Callable[[], None] | None:
        """Return a function that reports the second half of the work: space goes to the host."""
        if progress is None:
            return None
        most = max(1, self._reclaim.pending_clusters)
        return lambda: progress(2 * most - min(most, self._reclaim.pending_clusters), 2 * most)

    async def refuse_data(self, size: int) -> None:
        """Raise if the image itself, without its bases, holds data past ``size``.

        Zeros in the cluster in which the new end lies do not count.

        Raises:
            UsageError: There is data.
        """
        geometry, found = self._layer.geometry, None
        start, cluster_end = size, min(self._layer.size, geometry.ceil(size))
        while found is None and start < cluster_end:
            stop = min(start + _COMPARE_CHUNK_BYTES, cluster_end)
            extent = await self._first_in_use(start, stop)
            if extent is not None and any(await self._chain.read(start, stop - start)):
                found = start
            start = stop
        if found is None:
            extent = await self._first_in_use(cluster_end, self._layer.size)
            found = extent and extent.start
        if found is not None:
            msg = (
                f"{self._layer.file.name}: size: found data at {found}, past the new end at "
                f"{size}, expected none (--force drops it)"
            )
            raise UsageError(msg)

    async def _first_in_use(self, start: int, end: int) -> Extent | None:
        """Return the first extent of data or of a bad entry in a range; None if there is none."""
        geometry = self._layer.geometry
        while start < end:
            # A whole table with scattered clusters has too many extents for one lookup.
            table, reason = await self._layer.table_at(geometry.l1_index(start))
            step = min(geometry.table_span, _MAX_CLUSTERS_PER_LOOKUP * geometry.cluster_size)
            step = step if table or reason else geometry.table_span
            stop = min(end, start - start % step + step)
            for extent in await self._layer.lookup(start, stop - start):
                if extent.kind in (Kind.DATA, Kind.BAD):
                    return extent
            start = stop
            await trio.lowlevel.checkpoint()
        return None

    async def _drop_tables(self, first: int) -> None:
        """Remove the empty tables of the L1 entries from ``first`` on."""
        layer, step = self._layer, self._layer.tables.slice_entries
        start, length = layer.header.l1_table_offset, layer.geometry.table_bytes
        skip = (first - first % step) * ENTRY_BYTES
        # All slices have been written back, so a hole of the file has no entries.
        async for offset in DataSlices(layer.file, start, length, skip=skip):
            index = (offset - start) // ENTRY_BYTES
            slice_ = await layer.tables.load(start, index, L1)
            found = np.flatnonzero(np.frombuffer(slice_.entries, np.uint64)) + index
            for l1_index in found[found >= first].tolist():
                await self._drop_table(l1_index)

    async def _drop_table(self, l1_index: int) -> None:
        """Remove one table, unless an entry of it is in use."""
        layer, span = self._layer, self._layer.geometry.table_span
        table, reason = await layer.table_at(l1_index)
        if reason or await self._first_in_use(l1_index * span, (l1_index + 1) * span):
            return
        async with self._needcheck.changing():
            slice_ = await self._table_writer.writable_slice(
                layer.header.l1_table_offset, l1_index, L1
            )
            # No await from here on: the entry, the table registry and the quarantine change
            # atomically with respect to other tasks.
            layer.tables.set(slice_, l1_index % layer.tables.slice_entries, UNALLOCATED)
            layer.drop_table(l1_index, table)
            self._reclaim.retire(table, layer.geometry.table_bytes, slice_.offset)
            self._writeback.note_write()


def _half(progress: Progress | None) -> Progress | None:
    """Return a function that reports the first half of the work."""
    return None if progress is None else lambda done, whole: progress(done, 2 * whole)
