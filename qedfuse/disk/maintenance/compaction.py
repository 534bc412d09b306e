"""Compaction: the highest clusters move into the lowest holes, until there are none.

The file then is as long as what is in use in it: the *target*.  As many clusters in use
lie past the target as there are holes before it, so every data cluster past it finds a
hole, whichever is the lowest.  Tables come first, because they need neighbouring holes.

A compaction that is bounded has a higher target: the cluster from which on no more is in
use than may be moved.  Whether it gets there or ends before, because its time is over or
somebody stopped it, what was moved was the highest, and the end of the file is cut off
as far as that.

How a cluster is moved, and why that is safe, `qedfuse.disk.maintenance.mover` tells.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import trio

from qedfuse.disk.lookup.tablecache import L1
from qedfuse.disk.maintenance.reversemap import build_reverse_map
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.tablewalk import holds_data
from qedfuse.ondisk.constants import ENTRY_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.mover import Mover
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.space.spacemanager import SpaceManager

    Progress = Callable[[int, int], None]
    """Told how many bytes have been moved, and how many are to be moved in all."""

log = logging.getLogger(__name__)

_BATCH_BYTES: Final = 1 << 26
_QUICK_BATCH_BYTES: Final = 1 << 23
"""Data that is moved between two commit rounds, at most; the second if there are limits."""

_MAX_OWNERS: Final = 1 << 20
"""Most clusters whose owners are looked for in one pass over the tables: 32 MiB of numbers."""

_MAX_TABLES: Final = 1 << 20
"""Most tables that are kept in mind: 2 PiB in clusters of 64 KiB."""


class Limits(NamedTuple):
    """How much one compaction may do.

    Attributes:
        bytes: How much it may move.
        seconds: How long it may take; a system call under way is waited for.
    """

    bytes: int
    seconds: float


class Compaction:
    """Makes the file of an open image shorter, as far as it may."""

    def __init__(
        self,
        layer: QedLayer,
        allocator: Allocator,
        space: SpaceManager,
        mover: Mover,
        flusher: Flusher,
        reclaim: Reclaim,
    ) -> None:
        """Have ``mover`` move clusters of ``layer``."""
        self._layer = layer
        self._allocator = allocator
        self._space = space
        self._mover = mover
        self._flusher = flusher
        self._reclaim = reclaim
        self._bits = allocator.cluster_bits
        self._table = layer.geometry.table_size
        self._scope: trio.CancelScope | None = None
        self._stopped = False
        self._moved = 0
        self._total = 0
        self._progress: Progress = _silent

    async def run(
        self,
        progress: Progress | None = None,
        *,
        within_bound: bool = True,
        limits: Limits | None = None,
    ) -> int:
        """Move what has to be moved, the highest first; return how many clusters that were.

        No other request may be under way.

        Args:
            progress: Told how many bytes have been moved, and how many are to be.
            within_bound: Whether the file must not exceed its bound for a moment, even
                if something stays free for that.
            limits: How much may be moved, and how long that may take.

        Raises:
            HostError: The host refused; the image is sound, and less compact than it could be.
        """
        if not self._allocator.scan_complete or self._layer.damaged:
            log.warning("%s: not compacted: the image needs a check", self._layer.file.name)
            return 0
        if len(self._layer.l2_tables) > _MAX_TABLES:
            log.warning("%s: not compacted: too many L2 tables", self._layer.file.name)
            return 0
        self._moved = 0
        self._progress = progress or _silent
        try:
            # What is about to be cut off need not be punched first.
            with self._reclaim.punching_suspended():
                await self._flusher.flush()
                with trio.CancelScope() as self._scope:
                    if limits is not None:
                        self._scope.deadline = trio.current_time() + limits.seconds
                    if self._stopped:
                        self._scope.cancel()
                    await self._shorten(limits, within_bound=within_bound)
        except CorruptImageError as error:
            # Of two owners only one would get the copy.
            log.error("%s (while compacting): the image must be repaired", error)  # noqa: TRY400
            self._layer.mark_damaged()
        finally:
            self._scope = None
            self._progress = _silent
        return self._moved

    def stop(self) -> None:
        """End the compaction that is under way, and let no other one begin.

        What has been moved stays moved.
        """
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def _shorten(self, limits: Limits | None, *, within_bound: bool) -> None:
        """Move the highest clusters, as many as the limits allow."""
        allocator = self._allocator
        most = None if limits is None else limits.bytes >> self._bits
        self._total = self._used_from(self._target(most))
        while allocator.free.count:
            before = self._moved
            left = _MAX_OWNERS if most is None else min(_MAX_OWNERS, most - before)
            target = await self._move_tables(left, most, within_bound=within_bound)
            await self._move_data(target, quick=most is not None)
            if self._moved == before:
                break

    def _target(self, most: int | None = None) -> int:
        """Give the cluster at which the file can end if up to ``most`` clusters are moved."""
        end, free = self._allocator.end >> self._bits, self._allocator.free
        target = max(end - free.count, self._allocator.anchor)
        return target if most is None else max(target, free.tail_start(end, max(0, most)))

    def _used_from(self, target: int) -> int:
        """Count the clusters in use from a cluster on."""
        end = self._allocator.end >> self._bits
        return max(0, end - target - self._allocator.free.count_free(target, end - target))

    def _note(self, clusters: int) -> None:
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
            # A table of 1 GiB has 16,384 slices, of which a look at none has to wait.
            await trio.lowlevel.checkpoint()
            if not await self._is_hole(start, index):
                part = await self._layer.tables.load(start, index, L1)
                yield index, np.array(part.entries, np.uint64)

    async def _is_hole(self, table: int, index: int) -> bool:
        """Tell whether the slice with an entry is a hole of the file, and so has nothing."""
        tables, start = self._layer.tables, table + index * ENTRY_BYTES
        if tables.cached(table, index) is not None:
            return False
        length = tables.slice_entries * ENTRY_BYTES
        return not await holds_data(self._layer.file, start, length)

    async def _tables(self) -> dict[int, int]:
        """List the L2 tables: the first cluster of each, and its L1 index."""
        found = {}
        async for first, entries in self._l1_slices():
            for place in np.flatnonzero(entries).tolist():
                found[int(entries[place]) >> self._bits] = first + place
        return found

    def _ends_of_tables(self) -> int:
        """Give the first cluster behind the last L2 table."""
        tables = self._layer.l2_tables
        return (int(tables[-1]) >> self._bits) + self._table if len(tables) else 0

    async def _move_tables(self, left: int, most: int | None, *, within_bound: bool) -> int:
        """Bring the tables before the target that ``left`` clusters allow; return the target.

        It is a higher one where a table has to stay.
        """
        target = self._target(left)
        if most is not None and target > self._target():
            target = self._behind_table(target)
        if self._ends_of_tables() <= target:
            return target
        tables = await self._tables()
        for table in sorted(tables, reverse=True):
            if table + self._table <= target:
                break
            free = self._allocator.free
            place = free.find_slot() or free.find_run(self._table)
            if place is None or place + self._table > target:
                await self._pack_tables(most, within_bound=within_bound)
                break
            self._allocator.claim(place, self._table)
            await self._mover.move_table(tables[table], table, place)
            self._note(self._table)
        return max(target, self._ends_of_tables())

    def _behind_table(self, cluster: int) -> int:
        """Give a cluster, or the first one behind the table that it lies in."""
        tables = self._layer.l2_tables
        number = int(np.searchsorted(tables, np.uint64(cluster << self._bits))) - 1
        if number < 0:
            return cluster
        return max(cluster, (int(tables[number]) >> self._bits) + self._table)

    async def _pack_tables(self, most: int | None, *, within_bound: bool) -> None:
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
        # Each table may have to move, and as much data may be in its way.
        affordable = most is None or self._moved + 2 * (last - first) <= most
        if last > self._target() or (within_bound and not fits) or not affordable:
            log.debug("%s: compacted as far as there was room", self._layer.file.name)
            return
        await self._move_data(first, last)
        for want in range(first, last, size):
            if want in tables:
                continue
            # A table that overlaps its new place gets there by way of the file's end.
            table = min((at for at in tables if want < at < want + size), default=None)
            if table is not None:
                run = await self._space.allocate_table_at_end()
                place = run.offset >> self._bits
                await self._mover.move_table(tables[table], table, place)
                self._note(size)
                tables[place] = tables.pop(table)
                table = place
            else:
                table = max(tables)
            allocator.claim(want, size)
            await self._mover.move_table(tables[table], table, want)
            self._note(size)
            tables[want] = tables.pop(table)

    # Data

    async def _move_data(self, first: int, last: int | None = None, *, quick: bool = False) -> None:
        """Move data clusters from ``first`` on into the lowest holes, the highest first.

        With ``last`` only those before it, and to where ``last`` or what follows is.  With
        ``quick``, where no table lies from ``first`` on, tables are looked at only until all
        owners are found, and there are more commit rounds.
        """
        end = self._allocator.end if last is None else last << self._bits
        count = self._used_from(first)
        if not count:
            return
        owners = await build_reverse_map(
            self._layer, first << self._bits, end, count if quick else None
        )
        step = max(1, (_QUICK_BATCH_BYTES if quick else _BATCH_BYTES) >> self._bits)
        # The clusters of a batch move in the order of the guest's offsets, so that
        # neighbours stay neighbours.
        for stop in range(len(owners.entries), 0, -step):
            await self._mover.move_data(
                owners.entries[max(0, stop - step) : stop], last, self._note
            )
            await self._flusher.flush()


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""
