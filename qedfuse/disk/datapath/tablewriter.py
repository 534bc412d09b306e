"""Changing tables: creating missing L2 tables, and letting L2 entries point to new clusters.

Host space for the write-back of a slice (part of a table) is reserved before an entry changes in
memory.  D4 is a rule in docs/durability.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.slices import L1, L2, Pins
from qedfuse.errors import CorruptImageError
from qedfuse.util.pace import Pace

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_MAX_ZERO_WRITE_BYTES: Final = 1 << 20
"""Maximum bytes of one write that fills a new table with zeros."""


class TableWriter:
    """Changes the tables of one image."""

    def __init__(
        self,
        layer: QedLayer,
        space: SpaceManager,
        writeback: MetadataWriteback,
        flusher: Flusher,
        dirty_budget: int,
    ) -> None:
        """Change the tables of ``layer``; flush when more than ``dirty_budget`` bytes are dirty."""
        self._layer = layer
        self._space = space
        self._writeback = writeback
        self._flusher = flusher
        self._dirty_budget = dirty_budget
        self._lock = trio.Lock()

    def is_within_budget(self) -> bool:
        """Return whether the dirty slices fit in the budget; if so, `limit_dirty` does nothing."""
        return self._layer.tables.dirty_bytes <= self._dirty_budget

    async def limit_dirty(self) -> None:
        """Flush if the dirty slices exceed the budget; do nothing if they fit (D4).

        A request awaits this before it allocates or deallocates clusters.  So the memory for dirty
        slices stays bounded, and the request fails if the tables cannot be written back.

        Raises:
            HostError: The tables cannot be written back.
            ReadOnlyError: The disk has become read-only.
        """
        if not self.is_within_budget():
            await self._flusher.flush()

    async def ensure_table(self, l1_index: int) -> int:
        """Return the file offset of the L2 table of an L1 entry; create the table if it is missing.

        The caller must have left its epoch (`Epochs.leave`): see `SpaceManager.allocate`.

        Raises:
            CorruptImageError: The L1 entry is bad.
            HostError: A system call failed, or the file system is full; no table was created.
            ReadOnlyError: The disk has become read-only; no table was created.
        """
        layer = self._layer
        table, reason = await layer.table_at(l1_index)
        if reason:
            raise CorruptImageError(reason)
        if table:
            return table
        async with self._lock:
            table, _ = await layer.table_at(l1_index)
            if table:
                return table
            run = await self._space.allocate_table()
            try:
                if not run.never_written:
                    await self._fill_with_zeros(run)
                slice_ = await self.writable_slice(layer.header.l1_table_offset, l1_index, L1)
            except BaseException:
                self._space.release(run)
                raise
            layer.tables.set(slice_, l1_index % layer.tables.slice_entries, run.offset)
            layer.add_table(l1_index, run.offset)
            self._writeback.note_write()
            return run.offset

    async def _fill_with_zeros(self, run: Run) -> None:
        """Write zeros over the clusters of a new table; other tasks run in between."""
        pace = Pace()
        for offset in range(run.offset, run.end, _MAX_ZERO_WRITE_BYTES):
            size = min(_MAX_ZERO_WRITE_BYTES, run.end - offset)
            await self._layer.file.pwrite(offset, bytes(size))
            await pace.step()

    async def writable_slice(self, table: int, index: int, level: int) -> Slice:
        """Return the slice that holds a table entry; reserve host space for the slice's write-back.

        The caller must change or pin the slice before it awaits anything.

        Args:
            table: File offset of the table.
            index: Index of the entry in the table.
            level: `L1` or `L2`.

        Raises:
            HostError: The slice cannot be read, or the host refused to reserve the space.
        """
        tables = self._layer.tables
        slice_ = await tables.load(table, index, level)
        with Pins(slice_):
            await tables.reserve(slice_)
        return slice_

    async def point_to(self, table: int, start: int, run: Run) -> None:
        """Let the entries of an L2 table point to a run of clusters.

        Args:
            table: File offset of the table.
            start: Guest offset of the first cluster.
            run: The clusters; the table must have an entry for each of them.

        Raises:
            HostError: A slice cannot be read, or the host refused to reserve space for a slice.
                No entry has changed.
        """
        geometry = self._layer.geometry
        tables = self._layer.tables
        index = geometry.l2_index(start)
        end = index + (run.length >> geometry.cluster_bits)
        offset = run.offset
        # The caller frees the run if a slice cannot be loaded, so load all before any change.
        step = tables.slice_entries
        slices = []
        with Pins() as pins:
            for at in range(index - index % step, end, step):
                slice_ = await self.writable_slice(table, at, L2)
                # Pin the slice, so that loading the next slice does not evict it.
                pins.add(slice_)
                slices.append(slice_)
            for slice_ in slices:
                first = index % step
                for at in range(first, min(len(slice_.entries), first + end - index)):
                    tables.set(slice_, at, offset)
                    offset += geometry.cluster_size
                    index += 1
            self._writeback.note_write()
