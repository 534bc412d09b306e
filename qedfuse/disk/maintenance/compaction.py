"""Compaction: the highest clusters in use move to the lowest free ones, and the file is cut.

The *target* is the cluster at which the file ends once no free cluster is left in it.  There
are as many clusters in use past the target as free ones before it, so every data cluster
past the target finds a free one, whichever is the lowest.  Tables move first, because a
table needs adjacent free clusters.

A compaction may be limited to a number of moves.  If more clusters than that are in use past
the target, the target is set higher, so that only as many clusters as may move are in use
past it.

The file is cut by the flushes: `Reclaim.run`, which each of them runs, cuts off the free
clusters at the end of the file.  A compaction can end early, because its time is over or
because it was stopped.  The clusters moved until then were the highest, so the file can
still be cut to the highest cluster in use.

`qedfuse.disk.maintenance.mover` moves a cluster, and says why that is safe.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from qedfuse.disk.maintenance.datacompaction import MoveCounter
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.datacompaction import DataCompaction
    from qedfuse.disk.maintenance.tablecompaction import TableCompaction
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.util.backgroundtasks import Progress

log = logging.getLogger(__name__)

_MAX_MOVES_PER_PASS: Final = 1 << 20
"""Most clusters whose owners are found in one pass over the tables.  Takes 32 MiB of memory."""

_MAX_TABLES: Final = 1 << 20
"""Most L2 tables with which an image is compacted; with 64 KiB clusters they cover 2 PiB."""


class Limits(NamedTuple):
    """How much one compaction may do.

    Attributes:
        bytes: Most bytes that may be moved.
        seconds: How long the compaction may take.  A system call that is running at the end
            of this time is still waited for.
    """

    bytes: int
    seconds: float


class Compaction:
    """Makes the file of an open image shorter, within limits."""

    def __init__(
        self,
        layer: QedLayer,
        allocator: Allocator,
        tables: TableCompaction,
        data: DataCompaction,
        flusher: Flusher,
        reclaim: Reclaim,
    ) -> None:
        """Compact the file of ``layer``, by way of ``tables`` and ``data``."""
        self._layer = layer
        self._allocator = allocator
        self._tables = tables
        self._data = data
        self._flusher = flusher
        self._reclaim = reclaim
        self._bits = allocator.cluster_bits
        self._scope: trio.CancelScope | None = None
        self._stopped = False

    async def run(
        self,
        progress: Progress | None = None,
        *,
        within_bound: bool = True,
        limits: Limits | None = None,
    ) -> int:
        """Move the highest clusters and cut the file; return how many clusters were moved.

        The caller must ensure that no other request is running.  Nothing is moved, and a
        warning is logged, if the scan has not found all free clusters, if the image is
        damaged, or if it has too many tables.  If a corrupt table entry is found, the
        compaction ends, an error is logged, and the image is marked as damaged.  Reaching a
        limit is no error.

        Args:
            progress: Called with the bytes that have been moved, and with all that will be.
            within_bound: Never let the file become longer than its bound.  Tables may then
                be unable to move, and clusters stay free in the file.
            limits: How much may be moved, and how long that may take; None for no limits.

        Raises:
            HostError: The host refused; the image is sound, but not fully compacted.
        """
        if not self._allocator.scan_complete or self._layer.damaged:
            log.warning(
                "%s: not compacted: the free clusters are not known for certain; check the image",
                self._layer.file.name,
            )
            return 0
        if len(self._layer.l2_tables) > _MAX_TABLES:
            log.warning("%s: not compacted: too many L2 tables", self._layer.file.name)
            return 0
        counter = MoveCounter(progress, self._bits)
        try:
            # Punch nothing during the compaction: most free clusters are filled by a move
            # or cut off with the end of the file, so punching them would be wasted work.
            with self._reclaim.punching_suspended():
                await self._flusher.flush()
                with trio.CancelScope() as self._scope:
                    if limits is not None:
                        self._scope.deadline = trio.current_time() + limits.seconds
                    if self._stopped:
                        self._scope.cancel()
                    await self._shorten(limits, counter, within_bound=within_bound)
        except CorruptImageError as error:
            # `build_reverse_map` has found an entry that is no multiple of the cluster size, or
            # a cluster with two owners.  Such a cluster is never moved, because only one of
            # the owners would point to the copy.
            log.error("%s (while compacting): the image must be repaired", error)  # noqa: TRY400
            self._layer.mark_damaged()
        finally:
            self._scope = None
        return counter.moved

    def stop(self) -> None:
        """End the running compaction, and let later ones end before they move anything.

        Clusters that have been moved stay moved.
        """
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def _shorten(
        self, limits: Limits | None, counter: MoveCounter, *, within_bound: bool
    ) -> None:
        """Move the highest clusters, until no cluster is free or no more can or may be moved.

        Each pass of the loop moves up to `_MAX_MOVES_PER_PASS` clusters.
        """
        max_moves = None if limits is None else limits.bytes >> self._bits
        counter.expect(self._data.count_used_from(self._data.target(max_moves)))
        while self._allocator.free.count:
            before = counter.moved
            pass_moves = _MAX_MOVES_PER_PASS
            if max_moves is not None:
                pass_moves = min(pass_moves, max_moves - before)
            target = await self._tables.move(
                pass_moves, max_moves, counter, within_bound=within_bound
            )
            await self._data.move(target, counter, limited=max_moves is not None)
            if counter.moved == before:
                break
