"""Quarantine: clusters that lost their reference and must not be used again yet.

This is rule D5 in docs/durability.md.  Two things could go wrong if a cluster were used again
immediately.  A crash could bring back the old table, and the former owner would find another
owner's data in the cluster, or zeros.  And a request that looked up the cluster before the
reference was dropped may still be reading or writing the cluster.

When a write-back cycle begins, the quarantine *seals* all clusters that have lost their reference
up to that moment: they become a batch.  At that moment an epoch of requests (`Epochs`) ends.  The
batch stays in quarantine until the tables that dropped its clusters are durable, and until all
requests of that epoch and earlier ones have ended.

The number of batches is limited, because a failed scan, or a request that does not end, can keep
them in quarantine for as long as the image is open.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.space.epochs import Epoch, Epochs
    from qedfuse.disk.space.freemap import FreeMap

_MAX_SCATTERED_CLUSTERS: Final = 1 << 18
"""`Quarantine.retire_many` collects up to about this number of clusters, in 2 MiB of memory."""

_MAX_BATCHES: Final = 16
"""Maximum number of batches.  If there are more cycles, the last batch takes their clusters."""


class _Batch:
    """The clusters that were sealed when a write-back cycle, or each of some cycles, began.

    Attributes:
        clusters: The sealed clusters that have not left the quarantine yet.
        epoch: The epoch that ended when the last of the clusters were sealed.
        durable: Whether the tables that dropped the clusters are durable.
    """

    __slots__ = ("clusters", "durable", "epoch")

    def __init__(self, clusters: FreeMap, epoch: Epoch) -> None:
        self.clusters = clusters
        self.epoch = epoch
        self.durable = False


class Quarantine:
    """Holds clusters that lost their reference, in batches; a `CycleObserver` of the write-back."""

    def __init__(self, epochs: Epochs, empty: FreeMap) -> None:
        """Hold no cluster yet; ``empty`` is the empty map from which all maps here are made."""
        self._epochs = epochs
        self._unsealed = empty.empty_like()
        # Unsealed clusters that are not in `_unsealed` yet: see `retire_many`.
        self._scattered: list[NDArray[np.uint64]] = []
        self._scattered_count = 0
        self._batches: deque[_Batch] = deque()

    @property
    def count(self) -> int:
        """How many clusters are in quarantine."""
        return self.unsealed_count + sum(batch.clusters.count for batch in self._batches)

    @property
    def unsealed_count(self) -> int:
        """How many clusters have lost their reference since the last write-back cycle began."""
        return self._unsealed.count + self._scattered_count

    def retire(self, first: int, count: int) -> None:
        """Take in a run of ``count`` clusters to which no table in memory refers any more.

        The caller may change the entries before or after this call, but must not await anything
        between the two.  If this call came first, and a cycle began in between, the cycle would
        seal the clusters without writing the entries.  The clusters could then be used again while
        the file still refers to them.
        """
        self._unsealed.add(first, count)

    def retire_many(self, clusters: NDArray[np.uint64]) -> None:
        """Take in clusters, in any order, to which no table in memory refers any more.

        The caller must not await anything between changing the entries and this call.

        The entries of one table may have referred to clusters in all blocks of the map.  (A block
        has 4096 clusters: see `FreeMap`.)  Adding many clusters to a block together is cheaper, so
        the clusters of several calls are collected.
        """
        self._scattered.append(clusters)
        self._scattered_count += len(clusters)
        if self._scattered_count >= _MAX_SCATTERED_CLUSTERS:
            self._collect()

    def _collect(self) -> None:
        """Put the scattered clusters into the map of unsealed clusters."""
        if self._scattered:
            self._unsealed.add_many(np.concatenate(self._scattered))
            self._scattered.clear()
            self._scattered_count = 0

    def cycle_began(self) -> None:
        """Seal the unsealed clusters: the cycle makes durable the tables that dropped them."""
        self._collect()
        if not self._unsealed.count:
            return
        epoch = self._epochs.advance()
        if len(self._batches) < _MAX_BATCHES:
            self._batches.append(_Batch(self._unsealed, epoch))
            self._unsealed = self._unsealed.empty_like()
            return
        # The older clusters of the last batch now wait longer than necessary, until this cycle is
        # durable and this epoch is drained.  None of the clusters waits too short.
        last = self._batches[-1]
        last.epoch, last.durable = epoch, False
        while (block := self._unsealed.pop_block()) is not None:
            last.clusters.add_block(*block)

    def cycle_durable(self) -> None:
        """Mark all batches as durable: no table in the file refers to their clusters now."""
        for batch in self._batches:
            batch.durable = True

    def pop_reusable(self) -> tuple[int, int] | None:
        """Remove reusable clusters of one block of the map from the quarantine.

        Returns:
            The number of the block, and its bits, as in `FreeMap.bits`.  None if no cluster may be
            used again yet.
        """
        while self._batches and self._batches[0].durable:
            if not self._epochs.is_drained(self._batches[0].epoch):
                break
            found = self._batches[0].clusters.pop_block()
            if found is not None:
                return found
            self._batches.popleft()
        return None

    async def wait_drained(self) -> None:
        """Wait until no request is left that may use a cluster of the present batches.

        The caller must have left its epoch: see `Epochs.wait`.
        """
        if self._batches:
            await self._epochs.wait(self._batches[-1].epoch)
