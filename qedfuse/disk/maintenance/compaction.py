"""Compaction: the highest clusters in use move to the lowest free ones, and the file is cut.

The *target* is the cluster at which the file would end if no free cluster were left in it.  Past
the target there are as many clusters in use as free ones before it.  So every data cluster past the
target can move to a free one before it.  Tables move first, because a table needs adjacent
free clusters.

If the number of moves is limited, the target is raised until at most this number of clusters is in
use past it.  Each batch of moves ends with a flush, which cuts off the free end of the file
(`Reclaim.run`).

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
"""Maximum number of clusters that one pass moves.  The table entries that refer to them are found
together, which takes up to 32 MiB of memory."""

_MAX_TABLES: Final = 1 << 20
"""Maximum number of L2 tables in an image that is compacted."""


class Limits(NamedTuple):
    """How much one compaction may do.

    Attributes:
        bytes: Maximum number of bytes that may be moved.
        seconds: Maximum time, counted from the end of the flush before the first move.  A flush
            that has begun is completed.
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
        """Prepare to compact the file of ``layer``; ``tables`` and ``data`` choose what moves."""
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

        The caller must ensure that no request is running.  If the free clusters are not known for
        certain, or the image has more than `_MAX_TABLES` tables, a warning is logged, and nothing
        is moved.  If a corrupt table entry is found, an error is logged, and the compaction ends.

        Args:
            progress: Called with the number of bytes that have been moved, and with the number
                that will probably be moved in all.
            within_bound: Whether the file must never become longer than its bound
                (`Geometry.bound`).  If so, a move that could need a longer file is left out, and
                free clusters may stay in the file.
            limits: How much may be moved, and how long that may take; None for no limits.

        Raises:
            HostError: A system call failed; the image is sound, but not fully compacted.
            ReadOnlyError: The disk has become read-only during the call.
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
            # Most free clusters are filled by a move or cut off, so they need not be punched.
            with self._reclaim.punching_suspended():
                await self._flusher.flush()
                with trio.CancelScope() as self._scope:
                    if limits is not None:
                        self._scope.deadline = trio.current_time() + limits.seconds
                    if self._stopped:
                        self._scope.cancel()
                    await self._shorten(limits, counter, within_bound=within_bound)
        except CorruptImageError as error:
            # An entry is invalid, or a cluster has two owners.  Such a cluster must not be moved,
            # because only one of the two owners would point to the copy.
            log.error("%s (while compacting): the image must be repaired", error)  # noqa: TRY400
            self._layer.mark_damaged()
        finally:
            self._scope = None
        return counter.moved_clusters

    def stop(self) -> None:
        """End the running compaction, if any; later compactions end before they move a cluster."""
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def _shorten(
        self, limits: Limits | None, counter: MoveCounter, *, within_bound: bool
    ) -> None:
        """Move the highest clusters in passes, until no cluster is free or a pass moves nothing."""
        max_moves = None if limits is None else limits.bytes >> self._bits
        counter.expect(self._data.count_used_from(self._data.target(max_moves)))
        while self._allocator.free.count:
            before = counter.moved_clusters
            pass_moves = _MAX_MOVES_PER_PASS
            if max_moves is not None:
                pass_moves = min(pass_moves, max_moves - before)
            target = await self._tables.move(
                pass_moves, max_moves, counter, within_bound=within_bound
            )
            await self._data.move(target, counter, limited=max_moves is not None)
            if counter.moved_clusters == before:
                break
