"""Clusters that lost their reference and must not be used again yet (D5).

If a crash brought back the table as it was before, the old owner would find somebody
else's data in its cluster, or none.  And a request that looked the cluster up earlier
may still be reading or writing it.  So a cluster stays here until the table that dropped
it is durable and all requests that began before have ended.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.disk.space.epochs import Epoch, Epochs
    from qedfuse.disk.space.freemap import FreeMap

_LOOSE: Final = 1 << 18
"""Scattered clusters that are put into the map together: 2 MiB of numbers."""


class _Batch:
    """What lost its reference before one commit round."""

    __slots__ = ("clusters", "durable", "epoch")

    def __init__(self, clusters: FreeMap, epoch: Epoch) -> None:
        self.clusters = clusters
        self.epoch = epoch
        self.durable = False


class Quarantine:
    """Holds clusters, in the order in which they lost their reference; a bit for each."""

    def __init__(self, epochs: Epochs, make_map: Callable[[], FreeMap]) -> None:
        """Hold nothing yet; ``make_map`` makes an empty map of the file's clusters."""
        self._epochs = epochs
        self._make_map = make_map
        self._fresh = make_map()
        # What has come as well, but is not in the map yet.
        self._loose: list[NDArray[np.uint64]] = []
        self._loose_count = 0
        self._batches: deque[_Batch] = deque()

    @property
    def count(self) -> int:
        """How many clusters are in quarantine."""
        return self.fresh + sum(batch.clusters.count for batch in self._batches)

    @property
    def fresh(self) -> int:
        """How many clusters have come since the last commit round began."""
        return self._fresh.count + self._loose_count

    def retire(self, first: int, count: int) -> None:
        """Take in clusters in the same moment in which a table in memory drops them.

        No await between changing the entry and this call: a commit round that began in
        between would take the one without the other.
        """
        self._fresh.add(first, count)

    def retire_many(self, clusters: NDArray[np.uint64]) -> None:
        """Take in clusters that lie anywhere, as `retire` does.

        Those of one table may be scattered over all blocks of the map.  So they are
        collected until there are many for each block.
        """
        self._loose.append(clusters)
        self._loose_count += len(clusters)
        if self._loose_count >= _LOOSE:
            self._collect()

    def _collect(self) -> None:
        """Put into the map what is not in it yet."""
        if self._loose:
            self._fresh.add_many(np.concatenate(self._loose))
            self._loose.clear()
            self._loose_count = 0

    def seal(self) -> None:
        """Note that a commit round has taken the tables as they are now."""
        self._collect()
        if self._fresh.count:
            self._batches.append(_Batch(self._fresh, self._epochs.advance()))
            self._fresh = self._make_map()

    def durable(self) -> None:
        """Note that the round that sealed last, and all before it, are durable."""
        for batch in self._batches:
            batch.durable = True

    def take_due(self) -> tuple[int, int] | None:
        """Let go of some clusters that may be used again: a block of the map, and its bits."""
        while self._batches and self._batches[0].durable:
            if not self._epochs.is_drained(self._batches[0].epoch):
                break
            found = self._batches[0].clusters.pop_block()
            if found is not None:
                return found
            self._batches.popleft()
        return None

    async def wait(self) -> None:
        """Return when the requests have ended that what is sealed now waits for."""
        if self._batches:
            await self._epochs.wait(self._batches[-1].epoch)
