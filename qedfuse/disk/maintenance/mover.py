"""Moving clusters within the file: copy, change the entry, retire the old cluster.

After the copy has been written, a write-back cycle (`MetadataWriteback`) first makes the copy
durable, and then the entry that points to the copy.  The old cluster goes through the quarantine
(`Quarantine`).  So the image is sound at any moment.  No request may run during a move, because a
write in place does not check whether its cluster is being moved.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.lookup.slices import L1, L2, Pins
from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import runs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_COPY_BYTES: Final = 1 << 20
"""Maximum number of bytes that are copied with one read and one write."""


class Mover:
    """Moves data clusters and tables of one image."""

    def __init__(
        self,
        layer: QedLayer,
        allocator: Allocator,
        space: SpaceManager,
        table_writer: TableWriter,
        writeback: MetadataWriteback,
        flusher: Flusher,
        needcheck: NeedCheck,
        reclaim: Reclaim,
    ) -> None:
        """Move clusters of the image ``layer``."""
        self._layer = layer
        self._allocator = allocator
        self._space = space
        self._table_writer = table_writer
        self._writeback = writeback
        self._flusher = flusher
        self._needcheck = needcheck
        self._reclaim = reclaim
        self._bits = allocator.cluster_bits

    async def move_table(self, l1_index: int, table: int, slot: int) -> None:
        """Move the L2 table of an L1 entry to other clusters, durably.

        No slice of the table may be dirty or pinned.

        Args:
            l1_index: Index of the L1 entry.
            table: The first cluster of the table.
            slot: The first of the new clusters, all of which are allocated.

        Raises:
            HostError: A system call failed.  If only the flush at the end has failed, the table has
                moved.  Otherwise it has not, and the new clusters are free again.
            ReadOnlyError: The disk has become read-only during the flush; the table has moved.
        """
        layer = self._layer
        old, new, length = table << self._bits, slot << self._bits, layer.geometry.table_bytes
        is_unused = True
        try:
            await self._copy(old, new, length)
            async with self._needcheck.changing():
                slice_ = await self._table_writer.writable_slice(
                    layer.header.l1_table_offset, l1_index, L1
                )
                # No await up to the end of this block, so that the entry, the table registry
                # and the quarantine change atomically for other tasks.
                layer.tables.set(slice_, l1_index % layer.tables.slice_entries, new)
                is_unused = False
                layer.move_table(old, new)
                self._reclaim.retire(old, length, slice_.offset)
                self._writeback.note_write()
        finally:
            if is_unused:
                self._allocator.free_run(slot, layer.geometry.table_size)
        await self._flusher.flush()

    async def move_data(
        self, entries: NDArray[np.uint64], lowest: int | None, moved: Callable[[int], None]
    ) -> None:
        """Move the clusters that L2 entries refer to; the next flush makes the moves durable.

        Args:
            entries: File offsets of the entries.
            lowest: The lowest cluster that may be allocated; the file grows if none is free from
                there on.  With None, clusters move only to lower free clusters, or not at all.
            moved: Called with the number of clusters that have just been moved.

        Raises:
            HostError: A system call failed; earlier moves stay.
        """
        ordered = np.sort(entries)
        slice_bytes = self._layer.tables.slice_entries * ENTRY_BYTES
        tables = self._layer.l2_tables
        owners = tables[np.searchsorted(tables, ordered, "right") - 1]
        # The file offset of the slice of each entry.  Slices begin at multiples of their length
        # from the beginning of the table.
        starts = ordered - (ordered - owners) % np.uint64(slice_bytes)
        edges = np.flatnonzero(np.diff(starts)) + 1
        for first, last in pairwise([0, *edges.tolist(), len(ordered)]):
            if first < last:
                table, offset = int(owners[first]), int(starts[first])
                indices = ((ordered[first:last] - np.uint64(offset)) // ENTRY_BYTES).tolist()
                await self._move_entries(table, offset, indices, lowest, moved)

    async def _move_entries(
        self,
        table: int,
        offset: int,
        indices: Sequence[int],
        lowest: int | None,
        moved: Callable[[int], None],
    ) -> None:
        """Move the clusters of the entries ``indices``, ascending, of the slice at ``offset``."""
        size = self._layer.geometry.cluster_size
        edges = np.flatnonzero(np.diff(indices) != 1) + 1
        async with self._needcheck.changing():
            slice_ = await self._table_writer.writable_slice(
                table, (offset - table) // ENTRY_BYTES, L2
            )
            with Pins(slice_):
                for first, last in pairwise([0, *edges.tolist(), len(indices)]):
                    start, end = indices[first], indices[last - 1] + 1
                    for at, count, value in list(runs(slice_.entries, start, end, size)):
                        await self._move_run(slice_, at, count, value, lowest, moved)

    async def _move_run(
        self,
        slice_: Slice,
        at: int,
        count: int,
        value: int,
        lowest: int | None,
        moved: Callable[[int], None],
    ) -> None:
        """Move ``count`` contiguous clusters to one or more free runs.

        The first cluster lies at the file offset ``value``, and has the entry ``at`` of the slice.
        """
        tables, size = self._layer.tables, self._layer.geometry.cluster_size
        done = 0
        while done < count:
            if lowest is None:
                run = await self._space.allocate_lowest(count - done)
            else:
                run = await self._space.allocate_from(lowest, count - done)
            if run is None or (lowest is None and run.offset > value):
                if run is not None:
                    self._space.release(run)
                break
            try:
                await self._copy(value, run.offset, run.length)
            except BaseException:
                self._space.release(run)
                raise
            # No await up to the end of this pass of the loop, so that the entries and the
            # quarantine change atomically for other tasks.
            clusters = run.length >> self._bits
            for step in range(clusters):
                tables.set(slice_, at + done + step, run.offset + step * size)
            self._reclaim.retire(value, run.length, slice_.offset)
            self._writeback.note_write()
            moved(clusters)
            done, value = done + clusters, value + run.length

    async def _copy(self, source: int, target: int, length: int) -> None:
        """Copy bytes within the file.

        If the host permits, a hole stays one, because it can be 1 GiB.  A hole that begins less
        than `_COPY_BYTES` after data may be copied as zeros.
        """
        file, at = self._layer.file, 0
        while at < length:
            # Reads and writes that need not wait make no checkpoint.  Without this one a deadline
            # would have no effect.
            await trio.lowlevel.checkpoint()
            data = await file.next_data(source + at)
            if data is None:
                self._refuse_short_file(source + length)
            hole = (length if data is None else min(length, data - source)) - at
            if hole > 0 and file.can_punch:
                await file.punch((target + at, hole))
            # `punch` may just have found that the host cannot punch holes.  Then copy the zeros.
            if hole > 0 and file.can_punch:
                at += hole
            else:
                wanted = min(_COPY_BYTES, length - at)
                content = await file.pread(source + at, wanted)
                if len(content) < wanted:
                    self._refuse_short_file(source + length)
                await file.pwrite(target + at, content)
                at += len(content)

    def _refuse_short_file(self, end: int) -> None:
        """Raise a HostError if another program has cut the file to fewer than ``end`` bytes."""
        file = self._layer.file
        if file.size() < end:
            msg = f"{file.name}: found the file cut to {file.size()} bytes, expected at least {end}"
            raise HostError(msg)
