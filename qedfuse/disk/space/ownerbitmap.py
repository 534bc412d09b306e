"""Which clusters of the file somebody refers to, in memory that is bounded.

A file can claim to have 2^51 clusters without holding any data, so a map of all of them
must not be taken for granted.  Up to `MAPPED_CLUSTERS` there is a map of one bit each,
which the kernel gives only where it is touched; beyond, the references themselves are
kept, sorted, and their number is limited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.errors import NeedsCheckError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAPPED_CLUSTERS: Final = 1 << 31
"""Largest file, in clusters, for which there is a map: 256 MiB for 128 TiB in 64 KiB clusters."""

MAX_REFERENCES: Final = 1 << 24
"""Most references that are kept where there is no map: 128 MiB, and as much for sorting."""

_FULL: Final = 0xFF
_SCAN_BYTES: Final = 1 << 16


class OwnerBitmap:
    """The clusters that have an owner.

    Attributes:
        clusters: How many clusters the file has.
        count: How many of them have an owner.
    """

    def __init__(self, clusters: int, name: str) -> None:
        """Know nothing yet about a file of ``clusters`` clusters, called ``name``."""
        self._name = name
        self.clusters = clusters
        self._map: NDArray[np.uint8] | None = None
        if clusters <= MAPPED_CLUSTERS:
            self._map = np.zeros(-(-clusters // 8), np.uint8)
        self._sorted: list[NDArray[np.uint64]] = []
        self.count = 0

    def claim(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Give clusters an owner; tell which of them had one already.

        Of equal numbers within ``clusters`` the first one is the owner.
        """
        taken = np.zeros(len(clusters), np.bool_)
        order, ordered = None, clusters
        if len(clusters) > 1 and not (clusters[1:] > clusters[:-1]).all():
            order = self._order(clusters)
            ordered = clusters[order]
            taken[1:] = ordered[1:] == ordered[:-1]
        if self._map is not None:
            self._mark(ordered, taken)
        else:
            for known in self._sorted:
                place = np.searchsorted(known, ordered)
                place[place == len(known)] = 0
                taken |= known[place] == ordered
            self._keep(ordered[~taken])
        self.count += int(len(clusters) - taken.sum())
        if order is None:
            return taken
        answer = np.empty_like(taken)
        answer[order] = taken
        return answer

    def _order(self, clusters: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Tell how to sort clusters; equal ones stay in their order."""
        bits = len(clusters).bit_length()
        if self.clusters.bit_length() + bits > 64:  # noqa: PLR2004  bits of an entry
            return np.argsort(clusters, kind="stable")
        # Number and place in one word: sorting words is three times as fast as sorting places.
        words = clusters << np.uint64(bits) | np.arange(len(clusters), dtype=np.uint64)
        words.sort()
        return (words & np.uint64((1 << bits) - 1)).astype(np.intp)

    def _mark(self, ordered: NDArray[np.uint64], taken: NDArray[np.bool_]) -> None:
        """Set the bits of sorted clusters; note in ``taken`` which were set."""
        if self._map is None or not len(ordered):
            return
        places = (ordered >> np.uint64(3)).astype(np.intp)
        bits = np.left_shift(np.uint8(1), (ordered & np.uint64(7)).astype(np.uint8))
        taken |= (self._map[places] & bits) != 0
        # Clusters that share a byte of the map are joined first: an indexed |= sees only one.
        first = np.flatnonzero(np.concatenate(([True], places[1:] != places[:-1])))
        self._map[places[first]] |= np.bitwise_or.reduceat(bits, first)

    def _keep(self, clusters: NDArray[np.uint64]) -> None:
        """Remember sorted numbers; arrays of like length are merged, so there are few."""
        if not len(clusters):
            return
        self._check_room(len(clusters))
        while self._sorted and len(self._sorted[-1]) <= 2 * len(clusters):
            clusters = np.concatenate([self._sorted.pop(), clusters])
            clusters.sort(kind="stable")
        self._sorted.append(clusters)

    def _check_room(self, more: int) -> None:
        """Refuse to keep more references than there is memory for."""
        if self.count + more > MAX_REFERENCES:
            msg = (
                f"{self._name}: too large to check: found more than {MAX_REFERENCES} references "
                f"in a file of {self.clusters} clusters"
            )
            raise NeedsCheckError(msg)

    def claim_range(self, first: int, last: int) -> None:
        """Give the clusters from ``first`` up to ``last`` an owner, whoever had them."""
        last = min(last, self.clusters)
        if first >= last:
            return
        if self._map is None:
            self._check_room(last - first)
            self.claim(np.arange(first, last, dtype=np.uint64))
            return
        # Whole bytes of the map at once: a header can claim 2^32 clusters.
        begin, end = min(-(-first // 8), last // 8), last // 8
        if begin * 8 < first:  # all within one byte
            self.claim(np.arange(first, last, dtype=np.uint64))
            return
        for start in range(begin, end, _SCAN_BYTES):
            part = self._map[start : min(end, start + _SCAN_BYTES)]
            if part.any():
                self.count -= int(np.unpackbits(part).sum())
        self._map[begin:end] = _FULL
        self.count += 8 * (end - begin)
        self.claim(np.arange(first, 8 * begin, dtype=np.uint64))
        self.claim(np.arange(8 * end, last, dtype=np.uint64))

    def free_runs(self, end: int, limit: int) -> list[tuple[int, int]]:
        """Find the first ``limit`` runs of clusters below ``end`` that have no owner.

        Returns:
            The first cluster of each run and how many there are.
        """
        runs: list[tuple[int, int]] = []
        for first, count in self.free(end):
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            elif len(runs) == limit:
                break
            else:
                runs.append((first, count))
        return runs

    def owned(self, first: int, count: int) -> int:
        """Give one bit for each of ``count`` clusters from ``first`` on, set where it is owned.

        ``first`` may be negative; what lies outside the file has no owner.
        """
        low, high = max(0, first), min(first + count, self.clusters)
        if low >= high:
            return 0
        if self._map is not None:
            raw = self._map[low // 8 : -(-high // 8)].tobytes()
            bits = int.from_bytes(raw, "little") >> low % 8
        else:
            flags = np.zeros(high - low, np.uint8)
            for known in self._sorted:
                span = np.searchsorted(known, np.array([low, high], np.uint64))
                flags[(known[span[0] : span[1]] - np.uint64(low)).astype(np.intp)] = 1
            bits = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
        return (bits & ((1 << (high - low)) - 1)) << (low - first)

    def end(self) -> int:
        """Give the number past the last cluster that has an owner."""
        if self._map is None:
            return max((int(known[-1]) + 1 for known in self._sorted), default=0)
        for start in range(len(self._map) - 1 & -_SCAN_BYTES, -1, -_SCAN_BYTES):
            owned = np.flatnonzero(self._map[start : start + _SCAN_BYTES])
            if len(owned):
                place = start + int(owned[-1])
                return 8 * place + int(self._map[place]).bit_length()
        return 0

    def free(self, end: int) -> Iterator[tuple[int, int]]:
        """List stretches of free clusters below ``end``; neighbours are not joined."""
        if self._map is None:
            yield from self._gaps(end)
            return
        for start in range(0, -(-end // 8), _SCAN_BYTES):
            part = self._map[start : start + _SCAN_BYTES]
            length = min(8 * len(part), end - 8 * start)
            if not part.any():
                yield 8 * start, length
            elif not (part == _FULL).all():
                owned = np.unpackbits(part, bitorder="little")[:length]
                edges = np.flatnonzero(np.diff(owned, prepend=1, append=1))
                for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                    yield 8 * start + first, last - first

    def _gaps(self, end: int) -> Iterator[tuple[int, int]]:
        """List the gaps between the references that are kept."""
        known = np.concatenate([*self._sorted, np.array([end], np.uint64)])
        known.sort(kind="stable")
        known = known[: int(np.searchsorted(known, np.uint64(end))) + 1]
        if known[0]:
            yield 0, int(known[0])
        for start in range(0, len(known), _SCAN_BYTES):
            part = known[start : start + _SCAN_BYTES + 1]
            for place in np.flatnonzero(np.diff(part) > 1).tolist():
                first = int(part[place]) + 1
                yield first, int(part[place + 1]) - first
