"""Which clusters of the file somebody refers to, in memory that is bounded.

A file can claim to have 2^51 clusters without holding any data, so a map of all of them
must not be taken for granted.  Up to `DENSE_CLUSTERS` there is a map of one byte each,
which the kernel gives only where it is touched; beyond, the references themselves are
kept, sorted, and their number is limited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.errors import NeedsCheckError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DENSE_CLUSTERS: Final = 1 << 27
"""Largest file, in clusters, for which there is a map."""

MAX_REFERENCES: Final = 1 << 24
"""Most references that are kept where there is no map: 128 MiB, and as much for sorting."""


class References:
    """The clusters that have an owner."""

    def __init__(self, clusters: int, name: str) -> None:
        """Know nothing yet about a file of ``clusters`` clusters, called ``name``."""
        self._name = name
        self._clusters = clusters
        dense = clusters <= DENSE_CLUSTERS
        self._map: NDArray[np.uint8] | None = np.zeros(clusters, np.uint8) if dense else None
        self._sorted: list[NDArray[np.uint64]] = []
        self.count = 0

    def claim(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Give clusters an owner; tell which of them had one already.

        Of equal numbers within ``clusters`` the first one is the owner.
        """
        taken = np.zeros(len(clusters), np.bool_)
        if len(clusters) > 1 and not (clusters[1:] > clusters[:-1]).all():
            order = np.argsort(clusters, kind="stable")
            ordered = clusters[order]
            taken[order[1:]] = ordered[1:] == ordered[:-1]
        if self._map is not None:
            taken |= self._map[clusters] != 0
            self._map[clusters] = 1
        else:
            for known in self._sorted:
                place = np.searchsorted(known, clusters)
                place[place == len(known)] = 0
                taken |= known[place] == clusters
            self._keep(np.sort(clusters[~taken]))
        self.count += int(len(clusters) - taken.sum())
        return taken

    def _keep(self, clusters: NDArray[np.uint64]) -> None:
        """Remember sorted numbers; arrays of like length are merged, so there are few."""
        if not len(clusters):
            return
        if self.count + len(clusters) > MAX_REFERENCES:
            msg = (
                f"{self._name}: too large to check: found more than {MAX_REFERENCES} references "
                f"in a file of {self._clusters} clusters"
            )
            raise NeedsCheckError(msg)
        while self._sorted and len(self._sorted[-1]) <= 2 * len(clusters):
            clusters = np.sort(np.concatenate([self._sorted.pop(), clusters]))
        self._sorted.append(clusters)

    def claim_range(self, first: int, last: int) -> None:
        """Give the clusters from ``first`` up to ``last`` an owner, whoever had them."""
        if self._map is not None:
            part = self._map[first:last]
            self.count += int(len(part) - np.count_nonzero(part))
            part[:] = 1
        else:
            step = 1 << 20
            for start in range(first, last, step):
                self.claim(np.arange(start, min(last, start + step), dtype=np.uint64))
