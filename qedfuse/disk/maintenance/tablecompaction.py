"""Compaction of L2 tables.  It comes before that of the data: a table needs adjacent clusters."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from qedfuse.disk.lookup.slices import L1
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.datacompaction import DataCompaction, MoveCounter
    from qedfuse.disk.maintenance.mover import Mover
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.spacemanager import SpaceManager

log = logging.getLogger(__name__)


class TableCompaction:
    """Moves the highest L2 tables of an image down."""

    def __init__(
        self,
        layer: QedLayer,
        allocator: Allocator,
        space: SpaceManager,
        mover: Mover,
        data: DataCompaction,
    ) -> None:
        """Compact the tables of ``layer``; ``data`` moves data out of the way of the tables."""
        self._layer = layer
        self._allocator = allocator
        self._space = space
        self._mover = mover
        self._data = data
        self._bits = allocator.cluster_bits
        self._table_size = layer.geometry.table_size  # in clusters

    async def list_tables(self) -> dict[int, int]:
        """Return a dictionary from the first cluster of each L2 table to its L1 index.

        No slice may be dirty: in the file it can still be a hole, and holes are skipped.

        Raises:
            HostError: A system call failed.
        """
        layer, found = self._layer, {}
        start = layer.header.l1_table_offset
        async for offset in DataSlices(layer.file, start, layer.geometry.table_bytes):
            first = (offset - start) // ENTRY_BYTES
            entries = (await layer.tables.load(start, first, L1)).entries
            for index in np.flatnonzero(np.frombuffer(entries, np.uint64)).tolist():
                found[entries[index] >> self._bits] = first + index
        return found

    def _end_of_tables(self) -> int:
        """Return the first cluster after the last L2 table; 0 if there is no table."""
        tables = self._layer.l2_tables
        return (int(tables[-1]) >> self._bits) + self._table_size if len(tables) else 0

    async def move(
        self, pass_moves: int, max_moves: int | None, counter: MoveCounter, *, within_bound: bool
    ) -> int:
        """Move the tables that end past the target to free space before the target.

        The target is the cluster at which the file should end after this pass of the compaction.

        Args:
            pass_moves: How many clusters may be in use past the target, and so have to move.  To
                make adjacent space for tables, this method may move more.
            max_moves: How many clusters the whole compaction may move, also to make space for
                tables; None for no limit.
            counter: Counts the moves.
            within_bound: See `Compaction.run`.

        Returns:
            The target, or the first cluster after the last table if that is higher.

        Raises:
            CorruptImageError: A table entry does not point to the start of a cluster, or a
                cluster has two owners.
            HostError: A system call failed.  Tables that have been moved stay moved.
            ReadOnlyError: The disk has become read-only during the call.
        """
        target = self._data.target(pass_moves)
        if max_moves is not None and target > self._data.target():
            # The limit has raised the target, perhaps to a cluster within a table.  To move that
            # table as a whole could exceed the limit.
            target = self._after_table(target)
        if self._end_of_tables() <= target:
            return target
        tables = await self.list_tables()
        for table in sorted(tables, reverse=True):
            if table + self._table_size <= target:
                break
            free = self._allocator.free
            slot = free.find_slot() or free.find_run(self._table_size)
            if slot is None or slot + self._table_size > target:
                await self._pack(max_moves, counter, within_bound=within_bound)
                if max_moves is not None:
                    # `_pack` may have used up moves, and data that gave way may lie past the
                    # target.  So the target rises until the moves that are left suffice.
                    target = max(target, self._data.target(max_moves - counter.moved_clusters))
                break
            self._allocator.mark_used(slot, self._table_size)
            await self._mover.move_table(tables[table], table, slot)
            counter.add(self._table_size)
        return max(target, self._end_of_tables())

    def _after_table(self, cluster: int) -> int:
        """Return ``cluster``, or if it lies in a table that begins before it, the table's end."""
        tables = self._layer.l2_tables
        table_index = int(np.searchsorted(tables, np.uint64(cluster << self._bits))) - 1
        if table_index < 0:
            return cluster
        return max(cluster, (int(tables[table_index]) >> self._bits) + self._table_size)

    async def _pack(
        self, max_moves: int | None, counter: MoveCounter, *, within_bound: bool
    ) -> None:
        """Move all tables into adjacent places (slots), directly after the L1 table.

        The data clusters that are in the way move up first, which can make the file longer until
        the end of the compaction.  Nothing moves if the tables would reach past the target of a
        compaction without limits, if ``max_moves`` could be exceeded, or if the file could become
        longer than a file in which every cluster is allocated (only with ``within_bound``).
        """
        allocator, size = self._allocator, self._table_size
        tables = await self.list_tables()
        first = allocator.anchor
        last = first + len(tables) * size
        end, bound = allocator.end >> self._bits, allocator.bound >> self._bits
        # The data in the slots moves up.  A table that begins inside a slot, not at its start,
        # moves to the end of the file, and later into a slot.  Where this table lies in the slots
        # there is no data.  So a table that lies completely in the slots moves no more clusters up
        # than data in its place would.  At most one table reaches past the last slot; for this
        # table ``size`` is added.
        moves_up = (last - first) + size
        fits = end + moves_up <= bound
        # Then every table may move into a slot.
        moves = moves_up + (last - first)
        is_affordable = max_moves is None or counter.moved_clusters + moves <= max_moves
        if last > self._data.target() or (within_bound and not fits) or not is_affordable:
            log.debug("%s: not compacted further: tables cannot move", self._layer.file.name)
            return
        await self._data.move(first, counter, last=last)
        for slot in range(first, last, size):
            if slot in tables:
                continue
            # A table that begins inside the slot moves to the end of the file first.
            table = min((at for at in tables if slot < at < slot + size), default=None)
            if table is not None:
                run = await self._space.allocate_table_at_end()
                end_slot = run.offset >> self._bits
                await self._mover.move_table(tables[table], table, end_slot)
                counter.add(size)
                tables[end_slot] = tables.pop(table)
                table = end_slot
            else:
                table = max(tables)
            allocator.mark_used(slot, size)
            await self._mover.move_table(tables[table], table, slot)
            counter.add(size)
            tables[slot] = tables.pop(table)
