"""Quarantine: clusters that lost their reference and must not be used again yet (D5).

If a crash brought back the old table, the former owner would find another owner's data in
its cluster, or none.  And a request that looked up the cluster before may still be
reading or writing it.  So a cluster stays here until the table that dropped it is durable
and all requests that began before have ended (`Epochs`).

Clusters wait in batches.  When a write-back cycle begins, everything that has lost its
reference up to then is *sealed*: it becomes a batch, with the epoch that ends at that
moment.
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
"""Scattered clusters that are collected before they go into the map: 2 MiB of numbers."""


class _Batch:
    """The clusters that one write-back cycle has sealed."""

    __slots__ = ("clusters", "durable", "epoch")

    def __init__(self, clusters: FreeMap, epoch: Epoch) -> None:
        self.clusters = clusters
        self.epoch = epoch
        self.durable = False


class Quarantine:
    """Holds clusters in the order in which they lost their reference; one bit for each.

    It is a `CycleObserver` of the write-back.
    """

    def __init__(self, epochs: Epochs, empty: FreeMap) -> None:
        """Hold no cluster yet; ``empty`` is a map of the file's clusters."""
        self._epochs = epochs
        self._unsealed = empty.empty_like()
        # Clusters that are not in the map of unsealed ones yet.
        self._scattered: list[NDArray[np.uint64]] = []
        self._scattered_count = 0
        self._batches: deque[_Batch] = deque()

    @property
    def count(self) -> int:
        """How many clusters are in quarantine."""
        return self.unsealed + sum(batch.clusters.count for batch in self._batches)

    @property
    def unsealed(self) -> int:
        """How many clusters have come since the last write-back cycle began."""
        return self._unsealed.count + self._scattered_count

    def retire(self, first: int, count: int) -> None:
        """Take in a run of clusters that a table in memory has just dropped.

        No await between changing the entry and this call: a write-back cycle that began
        in between would seal the one without the other.
        """
        self._unsealed.add(first, count)

    def retire_many(self, clusters: NDArray[np.uint64]) -> None:
        """Take in clusters that lie anywhere, as `retire` does.

        The clusters of one table may be scattered over all blocks of the map.  They are
        collected until there are many for each block.
        """
        self._scattered.append(clusters)
        self._scattered_count += len(clusters)
        if self._scattered_count >= _MAX_SCATTERED_CLUSTERS:
            self._collect()

    def _collect(self) -> None:
        """Put the scattered clusters into the map of unsealed ones."""
        if self._scattered:
            self._unsealed.add_many(np.concatenate(self._scattered))
            self._scattered.clear()
            self._scattered_count = 0

    def cycle_began(self) -> None:
        """Seal the unsealed clusters: this cycle makes the tables durable that dropped them."""
        self._collect()
        if self._unsealed.count:
            self._batches.append(_Batch(self._unsealed, self._epochs.advance()))
            self._unsealed = self._unsealed.empty_like()

    def cycle_durable(self) -> None:
        """Mark all batches as durable: their clusters are not referred to in the file any more."""
        for batch in self._batches:
            batch.durable = True

    def pop_reusable(self) -> tuple[int, int] | None:
        """Remove some clusters that may be used again; None if there are none.

        Returns:
            A block of the map, and its bits.
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
        """Return when no request is left that may use a cluster of the present batches."""
        if self._batches:
            await self._epochs.wait(self._batches[-1].epoch)
