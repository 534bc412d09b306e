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

import trio

from qedfuse.disk.maintenance.datacompaction import MoveCounter
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.datacompaction import DataCompaction
    from qedfuse.disk.maintenance.tablecompaction import TableCompaction
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.reclaim import Reclaim

    Progress = Callable[[int, int], None]
    """Called with the bytes that have been moved, and with all that will be moved."""

log = logging.getLogger(__name__)

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
        counter = MoveCounter(progress, self._bits)
        try:
            # Clusters that are about to be cut off need not be punched first.
            with self._reclaim.punching_suspended():
                await self._flusher.flush()
                with trio.CancelScope() as self._scope:
                    if limits is not None:
                        self._scope.deadline = trio.current_time() + limits.seconds
                    if self._stopped:
                        self._scope.cancel()
                    await self._shorten(limits, counter, within_bound=within_bound)
        except CorruptImageError as error:
            # If a cluster with two owners moved, only one of them would point to the copy.
            log.error("%s (while compacting): the image must be repaired", error)  # noqa: TRY400
            self._layer.mark_damaged()
        finally:
            self._scope = None
        return counter.moved

    def stop(self) -> None:
        """End the running compaction, and prevent all later ones.

        Clusters that have been moved stay moved.
        """
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def _shorten(
        self, limits: Limits | None, counter: MoveCounter, *, within_bound: bool
    ) -> None:
        """Move the highest clusters, as many as the limits allow."""
        most = None if limits is None else limits.bytes >> self._bits
        counter.expect(self._data.count_used_from(self._data.target(most)))
        while self._allocator.free.count:
            before = counter.moved
            left = _MAX_MOVES_PER_PASS if most is None else min(_MAX_MOVES_PER_PASS, most - before)
            target = await self._tables.move(left, most, counter, within_bound=within_bound)
            await self._data.move(target, counter, limited=most is not None)
            if counter.moved == before:
                break
