"""Changing the size of the disk.

Growing: the added range reads as zeros, whatever a base or the file holds there.  Three
things could show through in the added range: bytes past the end of the disk in its last
cluster, table entries past the end, and a base that is longer than the disk.  They are
zeroed, refused or dropped, and hidden by zero clusters.  These changes are durable before
the new size is.

Shrinking has three steps, each durable before the next one begins:

1. The clusters of the range to be cut off are deallocated, and the bytes past the new end in
   the new last cluster are zeroed.
2. The size changes.
3. The tables past the new end are removed.

After a crash before step 2 the disk has its old size, and the range to be cut off may read
as zeros where it held data.  The user has asked to lose that data, and the image is sound.
If step 2 came first, a crash could leave entries past the end of the disk.  A program that
later grew the disk without looking for such entries would show the old data there.  Tables
are removed last, because before step 2 they hold the zero clusters that hide the base: an
overlay without them would show its base's data in the range to be cut off.
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
    from qedfuse.util.backgroundtasks import Progress


_ZERO_CHECK_BYTES: Final = 1 << 20
"""Most bytes that are read in one call to find out whether they are zeros."""

_MAX_CLUSTERS_PER_LOOKUP: Final = 1024
"""Most clusters of a table that are looked up before other tasks may run."""


class Resize:
    """Changes the size of a disk, and empties it.

    Attributes:
        lock: Held while the size changes, and by tasks that need the size to stay the same.
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
        discard: Discard,
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
        self._discard = discard
        self._needcheck = needcheck
        self._reclaim = reclaim
        self.lock = trio.Lock()

    def check(self, size: int, *, shrink: bool = False) -> None:
        """Raise unless the disk can get this size in bytes by growing, or by shrinking.

        The present size is always accepted.

        Args:
            size: The new size in bytes.
            shrink: Whether the disk shall shrink rather than grow.

        Raises:
            UsageError: The size is smaller without ``shrink`` or larger with it, is not a
                multiple of 512, or is more than the tables can address.
        """
        name, old, max_size = (
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
        if size % SECTOR or not 0 <= size <= max_size:
            msg = f"{name}: size: found {size}, expected a multiple of {SECTOR} up to {max_size}"
            raise UsageError(msg)

    async def grow(self, size: int, *, force: bool = False) -> None:
        """Grow the disk to ``size`` bytes, durably; do nothing if it is at least as large.

        Args:
            size: The new size, which the caller must have passed to `check`.
            force: Whether to deallocate the clusters to which table entries past the old
                end refer, instead of raising an error.

        Raises:
            CorruptImageError: A table entry for the added range is bad, or refers to data
                without ``force``; the disk has its old size.
            HostError: The host refused; the disk has its old size.
        """
        async with self.lock:
            if size <= self._layer.size:
                return
            await self._zero_past_end(size, force=force)
            # The zeros, and the entries that hide the base, must be durable before the size
            # is: after a crash the added range must not show what was there before.
            await self._writeback.barrier()
            await self._set_size(size)

    async def _set_size(self, size: int) -> None:
        """Write the size into the header, durably; afterwards the disk has this size.

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

        The last cluster may hold bytes past the end of the disk.  In the clusters after it
        a base that is longer than the disk would show through.

        Raises:
            CorruptImageError: A table entry for the range is bad, or refers to data without
                ``force``.
            HostError: The host refused.
        """
        geometry = self._layer.geometry
        old, cluster_end = self._layer.size, geometry.ceil(self._layer.size)
        base_end = max((base.size for base in self._chain.layers[1:]), default=0)
        if cluster_end < size:
            extent = await self._first_in_use(cluster_end, size)
            if extent is not None and force and extent.kind is Kind.DATA:
                await self._discard.drop(cluster_end, geometry.ceil(size))
            elif extent is not None:
                is_bad = extent.kind is Kind.BAD
                cure = (
                    "the image must be repaired first"
                    if is_bad
                    else "qedimg resize --force drops the data"
                )
                msg = (
                    f"{self._layer.file.name}: resize: found a table entry in use for guest "
                    f"offset {extent.start}, past the end of the disk at {old}, expected "
                    f"none: {cure}"
                )
                raise CorruptImageError(msg)
        if old < cluster_end:
            await self._write_path.zero_range(old, min(cluster_end, size))
        if cluster_end < min(size, base_end):
            await self._write_path.write_zero_clusters(
                cluster_end, geometry.ceil(min(size, base_end))
            )

    async def shrink(self, size: int, progress: Progress | None = None) -> None:
        """Shrink the disk to ``size`` bytes, durably, and drop the data past the new end.

        The caller must have passed ``size`` to `check`.  Unless data may be lost, the caller
        must also have called `refuse_data`.

        Args:
            size: The new size in bytes.
            progress: Called with how much work is done and how much there is, in any unit.

        Raises:
            CorruptImageError: A table entry for the range to be cut off is bad; the disk has
                its old size, and a part of the range may read as zeros.
            HostError: The host refused; the disk has its old size or the new one.
        """
        geometry = self._layer.geometry
        async with self.lock:
            old = self._layer.size
            # Zero the bytes past the new end in the new last cluster: another program might
            # later grow the disk without zeroing them, and show them again.
            last = await self._first_in_use(size, min(old, geometry.ceil(size)))
            if last is not None:
                await self._write_path.zero_range(last.start, last.end)
            await self._discard.drop(geometry.ceil(size), geometry.ceil(old), _first_half(progress))
            async with periodic_progress(self._report_second_half(progress)):
                await self._writeback.barrier()
                if size < old:
                    await self._set_size(size)
                await self._drop_tables(geometry.l1_used(size))
                await self._flusher.flush()

    async def empty(self, progress: Progress | None = None) -> None:
        """Make all clusters unallocated, so that the disk shows only its base, durably.

        All tables are removed after that, and the free clusters are cut off or punched.

        Args:
            progress: Called with how much work is done and how much there is, in any unit.

        Raises:
            CorruptImageError: A table entry is bad; a part may be unallocated now.
            HostError: The host refused; a part may be unallocated now.
        """
        async with self.lock:
            end = self._layer.geometry.ceil(self._layer.size)
            await self._discard.clear(0, end, _first_half(progress))
            async with periodic_progress(self._report_second_half(progress)):
                await self._writeback.barrier()
                await self._drop_tables(0)
                await self._flusher.flush()

    def _report_second_half(self, progress: Progress | None) -> Callable[[], None] | None:
        """Return a function that reports how far the second half of the work is.

        In the second half the space of the dropped clusters is returned to the host.
        Returns None without ``progress``.
        """
        if progress is None:
            return None
        total = max(1, self._reclaim.pending_clusters)
        return lambda: progress(2 * total - min(total, self._reclaim.pending_clusters), 2 * total)

    async def refuse_data(self, size: int) -> None:
        """Raise if the image itself, without its bases, holds data past ``size``.

        Zeros in the cluster in which ``size`` lies do not count as data.  In the clusters
        after it every allocated cluster and every bad entry counts.

        Raises:
            UsageError: There is data.
            CorruptImageError: The entry of the cluster in which ``size`` lies is bad.
            HostError: The host cannot read the image.
        """
        geometry, found = self._layer.geometry, None
        start, cluster_end = size, min(self._layer.size, geometry.ceil(size))
        while found is None and start < cluster_end:
            stop = min(start + _ZERO_CHECK_BYTES, cluster_end)
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
                f"{size}, expected none (--force drops the data)"
            )
            raise UsageError(msg)

    async def _first_in_use(self, start: int, end: int) -> Extent | None:
        """Return the first extent of data or of a bad entry in a range; None if there is none."""
        geometry = self._layer.geometry
        while start < end:
            # One lookup covers a part of a table at most: a whole table of scattered clusters
            # has an extent for each, and collecting them would delay other tasks too long.
            # The range of a missing table is one extent, so one lookup covers all of it.
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
        """Remove the tables without data of the L1 entries from ``first`` on.

        Zero clusters in these tables are lost.  The caller must ensure that no slice is dirty.
        """
        layer, step = self._layer, self._layer.tables.slice_entries
        start, length = layer.header.l1_table_offset, layer.geometry.table_bytes
        skip = (first - first % step) * ENTRY_BYTES
        # The caller has written all slices back, so holes of the file, which are skipped,
        # have no entries.
        async for offset in DataSlices(layer.file, start, length, skip=skip):
            index = (offset - start) // ENTRY_BYTES
            slice_ = await layer.tables.load(start, index, L1)
            found = np.flatnonzero(np.frombuffer(slice_.entries, np.uint64)) + index
            for l1_index in found[found >= first].tolist():
                await self._drop_table(l1_index)

    async def _drop_table(self, l1_index: int) -> None:
        """Remove the table of an L1 entry, unless it is bad or holds data or bad entries."""
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


def _first_half(progress: Progress | None) -> Progress | None:
    """Return a function that reports the first half of the work; None without ``progress``."""
    return None if progress is None else lambda done, total: progress(done, 2 * total)
