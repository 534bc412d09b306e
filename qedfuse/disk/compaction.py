"""Compaction: the highest clusters move into the lowest holes, until there are none.

The file then is as long as what is in use in it: the *target*.  As many clusters in use
lie past the target as there are holes before it, so every data cluster past it finds a
hole, whichever is the lowest.  Tables come first, because they need neighbouring holes.

Each step is an ordinary change: the copy is written, a commit round makes it durable
before the entry that points to it, and the old place goes through the quarantine.  So
the image is sound at any moment, and what was moved before an interruption stays moved.
Nothing else may be done with the disk meanwhile, because writes in place do not look
whether a cluster is on its way.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.tablecache import L1, L2
from qedfuse.ondisk.constants import ENTRY_BYTES, ZERO
from qedfuse.ondisk.table import runs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from numpy.typing import NDArray

    from qedfuse.disk.allocator import Allocator
    from qedfuse.disk.commit import Commit
    from qedfuse.disk.layer import QedLayer
    from qedfuse.disk.needcheck import NeedCheck
    from qedfuse.disk.reclaim import Reclaim
    from qedfuse.disk.requests import Requests
    from qedfuse.disk.tablecache import Slice

    Progress = Callable[[int, int], None]
    """Told how many bytes have been moved, and how many are to be moved in all."""

log = logging.getLogger(__name__)

_STEP: Final = 1 << 20
"""Bytes that are copied at once."""

_BATCH: Final = 1 << 26
"""Bytes that are moved between two commit rounds, about."""

_MAX_TABLES: Final = 1 << 20
"""Most tables that are kept in mind: 2 PiB in clusters of 64 KiB."""


class Compaction:
    """Makes the file of an open image as short as it can be."""

    def __init__(
        self,
        layer: QedLayer,
        allocator: Allocator,
        requests: Requests,
        commit: Commit,
        needcheck: NeedCheck,
        reclaim: Reclaim,
    ) -> None:
        """Move clusters of ``layer``, whose free clusters are known."""
        self._layer = layer
        self._allocator = allocator
        self._requests = requests
        self._commit = commit
        self._needcheck = needcheck
        self._reclaim = reclaim
        self._bits = allocator.cluster_bits
        self._table = layer.geometry.table_size
        self._moved = 0
        self._total = 0
        self._within_bound = True
        self._progress: Progress = lambda _done, _total: None

    async def run(self, progress: Progress | None = None, *, within_bound: bool = True) -> int:
        """Move what has to be moved; return how many clusters that were.

        Args:
            progress: Told how many bytes have been moved, and how many are to be.
            within_bound: Whether the file must not exceed its bound for a moment, even
                if something stays free for that.

        Raises:
            HostError: The host refused; the image is sound, and less compact than it could be.
        """
        if not self._allocator.known or self._layer.damaged:
            log.warning("%s: not compacted: the image needs a check", self._layer.file.name)
            return 0
        if len(self._layer.l2_tables) > _MAX_TABLES:
            log.warning("%s: not compacted: too many L2 tables", self._layer.file.name)
            return 0
        self._progress = progress or self._progress
        self._within_bound = within_bound
        self._moved = 0
        # What is about to be cut off need not be punched first.
        self._reclaim.punching = False
        try:
            await self._commit.flush()
            if self._allocator.free.count:
                self._total = await self._count_past(self._target())
                await self._move_tables()
                await self._move_data(self._target())
        finally:
            self._reclaim.punching = True
        return self._moved

    def _target(self) -> int:
        """Give the cluster at which the file can end."""
        used = (self._allocator.end >> self._bits) - self._allocator.free.count
        return max(used, self._allocator.anchor)

    async def _count_past(self, target: int) -> int:
        """Count the clusters in use from a cluster on."""
        end = self._allocator.end >> self._bits
        return end - target - self._allocator.free.holds(target, end - target)

    def _report(self, clusters: int) -> None:
        """Note that clusters were moved."""
        self._moved += clusters
        # Clusters that had to make room for a table are moved twice.
        total = max(self._total, self._moved)
        self._progress(self._moved << self._bits, total << self._bits)

    # Tables

    async def _l1_slices(self) -> AsyncIterator[tuple[int, NDArray[np.uint64]]]:
        """Read the L1 table: the index of each slice's first entry, and its entries."""
        start, entries = self._layer.header.l1_table_offset, self._layer.geometry.entries
        step = self._layer.tables.slice_entries
        for index in range(0, entries, step):
            if not await self._is_hole(start, index):
                part = await self._layer.tables.load(start, index, L1)
                yield index, np.array(part.entries, np.uint64)

    async def _is_hole(self, table: int, index: int) -> bool:
        """Tell whether the slice with an entry is a hole of the file, and so has nothing."""
        tables, start = self._layer.tables, table + index * ENTRY_BYTES
        if tables.cached(table, index) is not None:
            return False
        data = await self._layer.file.next_data(start)
        return data is None or data >= start + tables.slice_entries * ENTRY_BYTES

    async def _tables(self) -> dict[int, int]:
        """List the L2 tables: the first cluster of each, and its L1 index."""
        found = {}
        async for first, entries in self._l1_slices():
            for place in np.flatnonzero(entries).tolist():
                found[int(entries[place]) >> self._bits] = first + place
        return found

    async def _move_tables(self) -> None:
        """Bring all tables before the target."""
        tables = await self._tables()
        for table in sorted(tables, reverse=True):
            target = self._target()
            if table + self._table <= target:
                return
            free = self._allocator.free
            place = free.find_place() or free.find_run(self._table)
            if place is None or place + self._table > target:
                await self._pack_tables()
                return
            self._allocator.claim(place, self._table)
            await self._move_table(tables[table], table, place)

    async def _pack_tables(self) -> None:
        """Lay all tables side by side behind the L1 table.

        That works where free clusters are scattered so that no table fits between them.
        Data that lies in the way moves up first, and the file may become longer for that
        time; within its bound, unless `run` was told otherwise.
        """
        allocator, size = self._allocator, self._table
        tables = await self._tables()
        first = allocator.anchor
        last = first + len(tables) * size
        end, bound = allocator.end >> self._bits, allocator.bound >> self._bits
        fits = end + (last - first) + size <= bound
        if last > self._target() or (self._within_bound and not fits):
            log.info("%s: compacted as far as there was room", self._layer.file.name)
            return
        await self._move_data(first, last)
        for want in range(first, last, size):
            if want in tables:
                continue
            # A table that overlaps its new place gets there by way of the file's end.
            table = min((at for at in tables if want < at < want + size), default=None)
            if table is not None:
                run = await allocator.extend_table()
                tables[run.offset >> self._bits] = tables.pop(table)
                await self._move_table(
                    tables[run.offset >> self._bits], table, run.offset >> self._bits
                )
                table = run.offset >> self._bits
            else:
                table = max(tables)
            allocator.claim(want, size)
            await self._move_table(tables[table], table, want)
            tables[want] = tables.pop(table)

    async def _move_table(self, l1_index: int, table: int, place: int) -> None:
        """Move one L2 table, by clusters; ``place`` is taken already."""
        layer = self._layer
        old, new, length = table << self._bits, place << self._bits, layer.geometry.table_bytes
        taken = True
        try:
            await self._copy(old, new, length)
            async with self._needcheck.changing():
                part = await self._requests.writable_slice(
                    layer.header.l1_table_offset, l1_index, L1
                )
                # No await from here on: the entry, what is known of the table, and the
                # quarantine change in one step.
                layer.tables.set(part, l1_index % layer.tables.slice_entries, new)
                part.pins -= 1
                taken = False
                layer.move_table(old, new)
                self._reclaim.retire(old, length, part.offset)
                self._commit.note_write()
        finally:
            if taken:
                self._allocator.give_back(place, self._table)
        self._report(self._table)
        await self._commit.flush()

    # Data

    async def _move_data(self, first: int, last: int | None = None) -> None:
        """Move data clusters from ``first`` on into the lowest holes.

        With ``last`` only those before it, and to where ``last`` or what follows is.
        """
        layer = self._layer
        end = self._allocator.end if last is None else last << self._bits
        waiting = 0
        for table in await self._tables():
            for index in range(0, layer.geometry.entries, layer.tables.slice_entries):
                if await self._is_hole(table << self._bits, index):
                    continue
                part = await layer.tables.load(table << self._bits, index, L2)
                values = np.array(part.entries, np.uint64)
                where = (values > ZERO) & (values >= first << self._bits) & (values < end)
                if where.any():
                    waiting += await self._move_entries(table, index, where, last)
                if waiting << self._bits >= _BATCH:
                    await self._commit.flush()
                    waiting = 0
        await self._commit.flush()

    async def _move_entries(
        self, table: int, index: int, where: NDArray[np.bool_], above: int | None
    ) -> int:
        """Move the clusters of the marked entries of one slice; tell how many that were."""
        moved, size = 0, self._layer.geometry.cluster_size
        edges = np.flatnonzero(np.diff(where, prepend=False, append=False)).tolist()
        async with self._needcheck.changing():
            part = await self._requests.writable_slice(table << self._bits, index, L2)
            try:
                for start, end in zip(edges[::2], edges[1::2], strict=True):
                    for at, count, value in list(runs(part.entries, start, end, size)):
                        moved += await self._move_run(part, at, count, value, above)
            finally:
                part.pins -= 1
        return moved

    async def _move_run(
        self, part: Slice, at: int, count: int, value: int, above: int | None
    ) -> int:
        """Move neighbouring clusters, the first at file offset ``value``; tell how many."""
        tables, size = self._layer.tables, self._layer.geometry.cluster_size
        moved = 0
        while moved < count:
            run = await self._allocator.take(count - moved, above)
            if run is None or (above is None and run.offset > value):
                if run is not None:
                    self._allocator.release(run)
                break
            try:
                await self._copy(value, run.offset, run.length)
            except BaseException:
                self._allocator.release(run)
                raise
            # No await from here on, as above.
            clusters = run.length >> self._bits
            for step in range(clusters):
                tables.set(part, at + moved + step, run.offset + step * size)
            self._reclaim.retire(value, run.length, part.offset)
            self._commit.note_write()
            self._report(clusters)
            moved, value = moved + clusters, value + run.length
        return moved

    async def _copy(self, source: int, target: int, length: int) -> None:
        """Copy bytes within the file, holes as holes: a table of 1 GiB can be one."""
        file, at = self._layer.file, 0
        while at < length:
            data = await file.next_data(source + at)
            hole = (length if data is None else min(length, data - source)) - at
            if hole > 0 and file.can_punch:
                await file.punch((target + at, hole))
            # The first try may have told that the host cannot.
            if hole > 0 and file.can_punch:
                at += hole
            else:
                part = await file.pread(source + at, min(_STEP, length - at))
                await file.pwrite(target + at, part)
                at += len(part)
