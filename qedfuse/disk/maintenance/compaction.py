"""Compaction: the highest clusters in use move to the lowest free ones, and the file is cut.

The *target* is the cluster at which the file ends once no free cluster is left in it.  There
are as many clusters in use past the target as free ones before it, so every data cluster
past the target finds a free one, whichever is the lowest.  Tables move first, because a
table needs adjacent free clusters.

A compaction with limits has a higher target: the cluster past which no more clusters are in
use than may be moved.  If it ends early, because its time is over or because it was stopped,
the clusters that have moved were the highest, and the file is cut as far as that.

`qedfuse.disk.maintenance.mover` moves a cluster, and says why that is safe.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import trio

from qedfuse.disk.lookup.tablecache import L1
from qedfuse.disk.maintenance.reversemap import build_reverse_map
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.mover import Mover
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.space.spacemanager import SpaceManager

    Progress = Callable[[int, int], None]
    """Called with the bytes that have been moved, and with all that will be moved."""

log = logging.getLogger(__name__)

_BATCH_BYTES: Final = 1 << 26
"""Most data that is moved between two flushes."""
_LIMITED_BATCH_BYTES: Final = 1 << 23
"""The same for a compaction with limits, which ends between two batches."""

_MAX_MOVES_PER_PASS: Final = 1 << 20
"""Most clusters whose owners are found in one pass over the tables; takes 32 MiB of memory."""

_MAX_TABLES: Final = 1 << 20
"""Most L2 tables of an image that is compacted: 2 PiB of disk with clusters of 64 KiB."""


class Limits(NamedTuple):
    """How much one compaction may do.

    Attributes:
        bytes: Most bytes that may be moved.
        seconds: How long it may take; a system call that is running then is waited for.
    """

    bytes: int
    seconds: float


class Compaction:
    """Makes the file of an open image shorter, within limits."""

    def __init__(
        self,
        layer: QedLayer,
        allocator: Allocator,
        space: SpaceManager,
        mover: Mover,
        flusher: Flusher,
        reclaim: Reclaim,
    ) -> None:
        """Compact the file of ``layer``; ``mover`` moves its clusters."""
        self._layer = layer
        self._allocator = allocator
        self._space = space
        self._mover = mover
        self._flusher = flusher
        self._reclaim = reclaim
        self._bits = allocator.cluster_bits
        self._table_size = layer.geometry.table_size  # in clusters
        self._scope: trio.CancelScope | None = None
        self._stopped = False
        self._moved = 0
        self._total = 0
        self._progress: Progress = _no_progress

    async def run(
        self,
        progress: Progress | None = None,
        *,
        within_bound: bool = True,
        limits: Limits | None = None,
    ) -> int:
        """Move the highest clusters and cut the file; return how many clusters were moved.

        No other request may be running.

        Args:
            progress: Called with the bytes that have been moved, and with all that will be.
            within_bound: Never let the file exceed its bound, even if clusters stay free
                because of that.
            limits: How much may be moved, and how long that may take; None for no limits.

        Raises:
            HostError: The host refused; the image is sound, but not fully compacted.
        """
        if not self._allocator.scan_complete or self._layer.damaged:
            log.warning("%s: not compacted: the image needs a check", self._layer.file.name)
            return 0
        if len(self._layer.l2_tables) > _MAX_TABLES:
            log.warning("%s: not compacted: too many L2 tables", self._layer.file.name)
            return 0
        self._moved = 0
        self._progress = progress or _no_progress
        try:
            # Clusters that are about to be cut off need not be punched first.
            with self._reclaim.punching_suspended():
                await self._flusher.flush()
                with trio.CancelScope() as self._scope:
                    if limits is not None:
                        self._scope.deadline = trio.current_time() + limits.seconds
                    if self._stopped:
                        self._scope.cancel()
                    await self._shorten(limits, within_bound=within_bound)
        except CorruptImageError as error:
            # If a cluster with two owners moved, only one of them would point to the copy.
            log.error("%s (while compacting): the image must be repaired", error)  # noqa: TRY400
            self._layer.mark_damaged()
        finally:
            self._scope = None
            self._progress = _no_progress
        return self._moved

    def stop(self) -> None:
        """End the running compaction, and prevent all later ones.

        Clusters that have been moved stay moved.
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
            left = _MAX_MOVES_PER_PASS if most is None else min(_MAX_MOVES_PER_PASS, most - before)
            target = await self._move_tables(left, most, within_bound=within_bound)
            await self._move_data(target, limited=most is not None)
            if self._moved == before:
                break

    def _target(self, most: int | None = None) -> int:
        """Return the cluster at which the file can end if up to ``most`` clusters are moved."""
        end, free = self._allocator.end >> self._bits, self._allocator.free
        target = max(end - free.count, self._allocator.anchor)
        return target if most is None else max(target, free.tail_start(end, max(0, most)))

    def _used_from(self, target: int) -> int:
        """Return how many clusters are in use from cluster ``target`` on."""
        end = self._allocator.end >> self._bits
        return max(0, end - target - self._allocator.free.count_free(target, end - target))

    def _report_moved(self, clusters: int) -> None:
        """Count ``clusters`` as moved, and report the progress."""
        self._moved += clusters
        # A data cluster that gives way to a table is moved twice.
        total = max(self._total, self._moved)
        self._progress(self._moved << self._bits, total << self._bits)

    # Tables

    async def _tables(self) -> dict[int, int]:
        """Return the L1 index of each L2 table, by the table's first cluster.

        No slice may be dirty.
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
        """Return the first cluster after the last L2 table."""
        tables = self._layer.l2_tables
        return (int(tables[-1]) >> self._bits) + self._table_size if len(tables) else 0

    async def _move_tables(self, left: int, most: int | None, *, within_bound: bool) -> int:
        """Move tables from past the target to before it; return the target.

        Args:
            left: How many clusters may still be moved, which decides the target.
            most: How many clusters the whole compaction may move; None for no limit.
            within_bound: See `run`.

        Returns:
            The target: a higher one if a table past it could not be moved.
        """
        target = self._target(left)
        if most is not None and target > self._target():
            target = self._after_table(target)
        if self._end_of_tables() <= target:
            return target
        tables = await self._tables()
        for table in sorted(tables, reverse=True):
            if table + self._table_size <= target:
                break
            free = self._allocator.free
            slot = free.find_slot() or free.find_run(self._table_size)
            if slot is None or slot + self._table_size > target:
                await self._pack_tables(most, within_bound=within_bound)
                break
            self._allocator.claim(slot, self._table_size)
            await self._mover.move_table(tables[table], table, slot)
            self._report_moved(self._table_size)
        return max(target, self._end_of_tables())

    def _after_table(self, cluster: int) -> int:
        """Return the first cluster after the table that a cluster lies in, else the cluster."""
        tables = self._layer.l2_tables
        number = int(np.searchsorted(tables, np.uint64(cluster << self._bits))) - 1
        if number < 0:
            return cluster
        return max(cluster, (int(tables[number]) >> self._bits) + self._table_size)

    async def _pack_tables(self, most: int | None, *, within_bound: bool) -> None:
        """Move all tables next to each other, directly after the L1 table.

        This helps if the free clusters are scattered so that no table fits between them.
        Data in these clusters moves up first, and the file may become longer for that time.
        Does nothing if that exceeds the bound (``within_bound``) or ``most``.
        """
        allocator, size = self._allocator, self._table_size
        tables = await self._tables()
        first = allocator.anchor
        last = first + len(tables) * size
        end, bound = allocator.end >> self._bits, allocator.bound >> self._bits
        fits = end + (last - first) + size <= bound
        # Every table may have to move, and the same amount of data may have to give way.
        affordable = most is None or self._moved + 2 * (last - first) <= most
        if last > self._target() or (within_bound and not fits) or not affordable:
            log.debug("%s: not compacted further: tables cannot move", self._layer.file.name)
            return
        await self._move_data(first, last)
        for slot in range(first, last, size):
            if slot in tables:
                continue
            # A table that overlaps the slot moves to the end of the file first.
            table = min((at for at in tables if slot < at < slot + size), default=None)
            if table is not None:
                run = await self._space.allocate_table_at_end()
                end_slot = run.offset >> self._bits
                await self._mover.move_table(tables[table], table, end_slot)
                self._report_moved(size)
                tables[end_slot] = tables.pop(table)
                table = end_slot
            else:
                table = max(tables)
            allocator.claim(slot, size)
            await self._mover.move_table(tables[table], table, slot)
            self._report_moved(size)
            tables[slot] = tables.pop(table)

    # Data

    async def _move_data(
        self, first: int, last: int | None = None, *, limited: bool = False
    ) -> None:
        """Move the data clusters from ``first`` on to the lowest free ones, the highest first.

        Args:
            first: The first cluster that moves.
            last: The cluster before which the clusters to move end, and from which on they
                are moved; None to move all up to the end of the file.
            limited: Stop reading tables once all owners are found, and flush more often.
                Requires that no table lies from ``first`` on.
        """
        end = self._allocator.end if last is None else last << self._bits
        count = self._used_from(first)
        if not count:
            return
        owners = await build_reverse_map(
            self._layer, first << self._bits, end, count if limited else None
        )
        step = max(1, (_LIMITED_BATCH_BYTES if limited else _BATCH_BYTES) >> self._bits)
        # The clusters of a batch move in the order of their guest offsets, so that clusters
        # that are adjacent on the disk become adjacent in the file.
        for stop in range(len(owners.entries), 0, -step):
            await self._mover.move_data(
                owners.entries[max(0, stop - step) : stop], last, self._report_moved
            )
            await self._flusher.flush()


def _no_progress(_done: int, _total: int) -> None:
    """Report nothing."""
