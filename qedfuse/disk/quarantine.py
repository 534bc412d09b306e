"""Clusters that lost their reference and must not be used again yet (D5).

If a crash brought back the table as it was before, the old owner would find somebody
else's data in its cluster, or none.  And a request that looked the cluster up earlier
may still be reading or writing it.  So a cluster stays here until the table that dropped
it is durable and all requests that began before have ended.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qedfuse.disk.grace import Grace, Turn


class _Batch:
    """What lost its reference before one commit round."""

    __slots__ = ("durable", "runs", "turn")

    def __init__(self, runs: list[tuple[int, int]], turn: Turn) -> None:
        self.runs = runs
        self.turn = turn
        self.durable = False


class Quarantine:
    """Holds runs of clusters, in the order in which they lost their reference.

    Attributes:
        length: Bytes in quarantine.
    """

    def __init__(self, grace: Grace) -> None:
        """Hold nothing yet."""
        self._grace = grace
        self._fresh: list[tuple[int, int]] = []
        self._batches: deque[_Batch] = deque()
        self.length = 0

    def retire(self, offset: int, length: int) -> None:
        """Take in clusters in the same moment in which a table in memory drops them.

        No await between changing the entry and this call: a commit round that began in
        between would take the one without the other.
        """
        self.length += length
        if self._fresh and sum(self._fresh[-1]) == offset:
            self._fresh[-1] = (self._fresh[-1][0], self._fresh[-1][1] + length)
        else:
            self._fresh.append((offset, length))

    def seal(self) -> None:
        """Note that a commit round has taken the tables as they are now."""
        if self._fresh:
            self._batches.append(_Batch(self._fresh, self._grace.turn()))
            self._fresh = []

    def durable(self) -> None:
        """Note that the round that sealed last, and all before it, are durable."""
        for batch in self._batches:
            batch.durable = True

    def due(self) -> list[tuple[int, int]]:
        """Let go of what may be used again: file offsets and lengths in bytes."""
        runs: list[tuple[int, int]] = []
        while self._batches and self._batches[0].durable:
            if not self._grace.over(self._batches[0].turn):
                break
            runs += self._batches.popleft().runs
        self.length -= sum(length for _, length in runs)
        return runs

    async def wait(self) -> None:
        """Return when the requests have ended that what is sealed now waits for."""
        if self._batches:
            await self._grace.wait(self._batches[-1].turn)
