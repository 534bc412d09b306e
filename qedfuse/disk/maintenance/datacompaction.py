"""Compaction of data: clusters at the end of the file move into the lowest free clusters.

The moves are counted, for the limits of a compaction and for its progress.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.disk.maintenance.reversemap import build_reverse_map

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.mover import Mover
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.util.backgroundtasks import Progress

_BATCH_BYTES: Final = 1 << 26
"""Maximum number of bytes that are moved between two flushes."""
_LIMITED_BATCH_BYTES: Final = 1 << 23
"""The same for a compaction with limits.  It is lower, because a flush that has begun is completed
even after the time limit."""


class MoveCounter:
    """Counts the clusters that one compaction has moved, and reports the progress.

    Attributes:
        moved_clusters: How many clusters have been moved.
    """

    def __init__(self, progress: Progress | None, cluster_bits: int) -> None:
        """Start at 0; ``progress`` is called with the bytes moved, and the bytes to move in all."""
        self.moved_clusters = 0
        self._progress = progress
        self._bits = cluster_bits
        self._expected_clusters = 0

    def expect(self, clusters: int) -> None:
        """Set how many clusters the whole compaction will probably move."""
        self._expected_clusters = clusters

    def add(self, clusters: int) -> None:
        """Count ``clusters`` as moved, and report the progress."""
        self.moved_clusters += clusters
        if self._progress is not None:
            # A data cluster that gives way to a table may move twice.
            total = max(self._expected_clusters, self.moved_clusters)
            self._progress(self.moved_clusters << self._bits, total << self._bits)


class DataCompaction:
    """Moves data clusters of an image: the highest ones down, or those of a range up."""

    def __init__(
        self, layer: QedLayer, allocator: Allocator, mover: Mover, flusher: Flusher
    ) -> None:
        """Compact the data of ``layer``; ``mover`` moves the clusters."""
        self._layer = layer
        self._allocator = allocator
        self._mover = mover
        self._flusher = flusher
        self._bits = allocator.cluster_bits

    def target(self, max_moves: int | None = None) -> int:
        """Return the cluster at which the file can end after at most ``max_moves`` moves."""
        end, free = self._allocator.end >> self._bits, self._allocator.free
        target = max(end - free.count, self._allocator.anchor)
        if max_moves is None:
            return target
        return max(target, free.tail_start(end, max(0, max_moves)))

    def count_used_from(self, cluster: int) -> int:
        """Return how many clusters are in use from ``cluster`` up to the end of the file."""
        end = self._allocator.end >> self._bits
        return max(0, end - cluster - self._allocator.free.count_free(cluster, end - cluster))

    async def move(
        self, first: int, counter: MoveCounter, *, last: int | None = None, limited: bool = False
    ) -> None:
        """Move the data clusters at or past ``first``, durably, in batches, the highest first.

        Args:
            first: The lowest cluster that moves.
            counter: Counts the moves.
            last: If None, the data clusters move to the lowest free clusters, and a cluster stays
                if no lower one is free.  If not None, only the data clusters before ``last`` move,
                to free clusters at or past ``last``.
            limited: Whether to flush more often, and to stop reading tables when an L2 entry has
                been found for each used cluster from ``first`` on.  If one of these clusters holds
                a table, all tables are read, because no L2 entry refers to it.

        Raises:
            CorruptImageError: A table entry does not point to the start of a cluster, or a cluster
                has two owners.  This call has moved no cluster.
            HostError: A system call failed.  Clusters that have been moved stay moved.
            ReadOnlyError: The disk has become read-only during the call.
        """
        end = self._allocator.end if last is None else last << self._bits
        count = self.count_used_from(first)
        if not count:
            return
        owners = await build_reverse_map(
            self._layer, first << self._bits, end, count if limited else None
        )
        step = max(1, (_LIMITED_BATCH_BYTES if limited else _BATCH_BYTES) >> self._bits)
        # Within a batch, `move_data` moves clusters in the order of their L2 entries.  So data that
        # is adjacent on the disk becomes adjacent in the file.
        for stop in range(len(owners.entries), 0, -step):
            entries = owners.entries[max(0, stop - step) : stop]
            await self._mover.move_data(entries, last, counter.add)
            await self._flusher.flush()
