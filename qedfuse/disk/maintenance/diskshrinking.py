"""Shrinking and emptying a disk: clusters past the new end, or all, are removed with their tables.

Shrinking has three steps, each durable before the next one begins:

1. The range past the new end is zeroed or deallocated.
2. The size changes.
3. The tables past the new end are removed.  A table with data or a bad entry past the old end is
kept.

Step 2 comes after step 1.  Otherwise a crash could leave entries past the end of the disk, and a
program that later grew the disk could show the old data.  After a crash before step 2 the range may
read as zeros.  This does no harm, because the user has asked to drop the data of the range.

Step 3 comes after step 2, because the tables hold the zero clusters that hide the base.  Otherwise
a crash could leave an overlay of the old size that shows data of its base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.lookup.slices import L1
from qedfuse.disk.maintenance.disksize import first_in_use
from qedfuse.errors import UsageError
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED
from qedfuse.util.backgroundtasks import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.datapath.discard import Discard
    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.disksize import DiskSize
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.util.backgroundtasks import Progress

_ZERO_CHECK_BYTES: Final = 1 << 20
"""Maximum number of bytes that are read in one call to look for bytes that are not zero."""


class DiskShrinking:
    """Shrinks a disk, and empties it."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        disk_size: DiskSize,
        table_writer: TableWriter,
        write_path: WritePath,
        discard: Discard,
        writeback: MetadataWriteback,
        flusher: Flusher,
        needcheck: NeedCheck,
        reclaim: Reclaim,
    ) -> None:
        """Prepare to shrink the disk of ``layer``, the top of ``chain``."""
        self._chain = chain
        self._layer = layer
        self._disk_size = disk_size
        self._table_writer = table_writer
        self._write_path = write_path
        self._discard = discard
        self._writeback = writeback
        self._flusher = flusher
        self._needcheck = needcheck
        self._reclaim = reclaim

    async def refuse_data(self, size: int) -> None:
        """Raise if the image itself, without its bases, holds data past ``size``.

        In the cluster in which ``size`` lies, only bytes that are not zero count as data.  Past
        that cluster, every allocated cluster and every bad entry counts.

        Raises:
            UsageError: There is data past ``size``; the message has the guest offset.
            CorruptImageError: The entry of the cluster in which ``size`` lies is bad.
            HostError: The host cannot read the image.
        """
        geometry, found = self._layer.geometry, None
        start, cluster_end = size, min(self._layer.size, geometry.ceil(size))
        while found is None and start < cluster_end:
            stop = min(start + _ZERO_CHECK_BYTES, cluster_end)
            extent = await first_in_use(self._layer, start, stop)
            if extent is not None:
                content = await self._chain.read(start, stop - start)
                if any(content):
                    found = start + len(content) - len(content.lstrip(b"\0"))
            start = stop
        if found is None:
            extent = await first_in_use(self._layer, cluster_end, self._layer.size)
            found = extent and extent.start
        if found is not None:
            msg = (
                f"{self._layer.file.name}: size: found data at {found}, past the new end at "
                f"{size}, expected none (--force drops the data)"
            )
            raise UsageError(msg)

    async def shrink(self, size: int, progress: Progress | None = None) -> None:
        """Shrink the disk to ``size`` bytes, durably, and drop the data past the new end.

        The caller must have passed ``size`` to `DiskSize.check`.  If the user has not allowed the
        loss of data, the caller must also have called `refuse_data`.

        Args:
            size: The new size in bytes.
            progress: Called with the work done so far and the whole work, both in the same
                arbitrary unit.

        Raises:
            CorruptImageError: A table entry for the range to be cut off is bad; the disk has its
                old size, and a part of the range may read as zeros.
            HostError: A system call failed.  The disk has its new size, or it has its old size and
                a part of the range to be cut off may read as zeros.
            ReadOnlyError: The disk has become read-only during the call.  The state of the disk is
                as after HostError.
        """
        geometry = self._layer.geometry
        async with self._disk_size.lock:
            old = self._layer.size
            # Zero the rest of the last cluster.  Otherwise the disk would show these bytes again if
            # another program grew it.
            rest = await first_in_use(self._layer, size, min(old, geometry.ceil(size)))
            if rest is not None:
                await self._write_path.zero_range(rest.start, rest.end)
            await self._discard.drop(geometry.ceil(size), geometry.ceil(old), _first_half(progress))
            async with periodic_progress(self._report_second_half(progress)):
                await self._writeback.barrier()
                if size < old:
                    await self._disk_size.change(size)
                await self._drop_tables(geometry.l1_used(size))
                await self._flusher.flush()

    async def empty(self, progress: Progress | None = None) -> None:
        """Make all clusters unallocated, durably, so that the disk shows only its base.

        After that, the L2 tables are removed, except those with data or a bad entry past the end of
        the disk.

        Args:
            progress: As for `shrink`.

        Raises:
            CorruptImageError: A table entry is bad; a part of the disk may be unallocated.
            HostError: A system call failed; a part of the disk, or all, may be unallocated.
            ReadOnlyError: The disk has become read-only during the call; a part of the disk, or
                all, may be unallocated.
        """
        async with self._disk_size.lock:
            end = self._layer.geometry.ceil(self._layer.size)
            await self._discard.clear(0, end, _first_half(progress))
            async with periodic_progress(self._report_second_half(progress)):
                await self._writeback.barrier()
                await self._drop_tables(0)
                await self._flusher.flush()

    def _report_second_half(self, progress: Progress | None) -> Callable[[], None] | None:
        """Return a function that reports the second half of the work; None without ``progress``.

        In the second half the space of the dropped clusters is returned to the host.
        """
        if progress is None:
            return None
        total = max(1, self._reclaim.pending_clusters)
        return lambda: progress(2 * total - min(total, self._reclaim.pending_clusters), 2 * total)

    async def _drop_tables(self, first: int) -> None:
        """Remove the tables of the L1 entries at or past index ``first``, unless they are needed.

        The zero clusters of the removed tables are lost.  The caller must ensure that no slice is
        dirty.
        """
        layer, step = self._layer, self._layer.tables.slice_entries
        start, length = layer.header.l1_table_offset, layer.geometry.table_bytes
        skip = (first - first % step) * ENTRY_BYTES
        # The loop skips holes of the file.  No entry is missed, because no slice is dirty.
        async for offset in DataSlices(layer.file, start, length, skip=skip):
            index = (offset - start) // ENTRY_BYTES
            slice_ = await layer.tables.load(start, index, L1)
            found = np.flatnonzero(np.frombuffer(slice_.entries, np.uint64)) + index
            for l1_index in found[found >= first].tolist():
                await self._drop_table(l1_index)

    async def _drop_table(self, l1_index: int) -> None:
        """Remove the table of an L1 entry, unless the table is needed.

        The L1 entry must not be 0.  Does nothing if it is bad, or if an entry of the table is bad
        or refers to data.
        """
        layer, span = self._layer, self._layer.geometry.table_span
        table, reason = await layer.table_at(l1_index)
        if reason or await first_in_use(self._layer, l1_index * span, (l1_index + 1) * span):
            return
        async with self._needcheck.changing():
            slice_ = await self._table_writer.writable_slice(
                layer.header.l1_table_offset, l1_index, L1
            )
            # No await up to the end of this block: to other tasks, the entry, the table registry
            # and the quarantine must change in one step.
            layer.tables.set(slice_, l1_index % layer.tables.slice_entries, UNALLOCATED)
            layer.drop_table(l1_index, table)
            self._reclaim.retire(table, layer.geometry.table_bytes, slice_.offset)
            self._writeback.note_write()


def _first_half(progress: Progress | None) -> Progress | None:
    """Return a progress function for the first half of the work; None without ``progress``."""
    return None if progress is None else lambda done, total: progress(done, 2 * total)
