"""Which clusters of the file have an owner, in bounded memory.

The owner of a cluster is the table entry, or the part of the header, that refers to it.  A file of
up to `MAX_BITMAP_CLUSTERS` clusters gets a bitmap, for which the kernel allocates memory only where
bits are set.  For a larger file the numbers of the owned clusters are kept in sorted arrays, at
most `MAX_LISTED_CLUSTERS` of them, because a sparse file can have 2^51 clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.errors import NeedsCheckError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAX_BITMAP_CLUSTERS: Final = 1 << 31
"""Maximum number of clusters of a file that gets a bitmap; the bitmap takes up to 256 MiB."""

MAX_LISTED_CLUSTERS: Final = 1 << 24
"""Maximum number of owned clusters of a file without a bitmap; sorting takes up to 256 MiB."""

_FULL_BYTE: Final = 0xFF
_ITEMS_PER_STEP: Final = 1 << 16
"""Maximum number of bytes of the bitmap, or of numbers of clusters, to examine in one step."""


class OwnerBitmap:
    """The clusters that have an owner.

    Attributes:
        clusters: How many clusters the file has.
        count: How many clusters have an owner.
    """

    def __init__(self, clusters: int, name: str) -> None:
        """Start without owners in a file of ``clusters`` clusters; ``name`` is for messages."""
        self._name = name
        self.clusters = clusters
        self._map: NDArray[np.uint8] | None = None
        if clusters <= MAX_BITMAP_CLUSTERS:
            self._map = np.zeros(-(-clusters // 8), np.uint8)
        self._sorted: list[NDArray[np.uint64]] = []
        self.count = 0

    @property
    def is_limited(self) -> bool:
        """Whether at most `MAX_LISTED_CLUSTERS` clusters can get an owner."""
        return self._map is None

    def claim(self, clusters: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Give each cluster an owner; return for each whether it had an owner before.

        If a cluster occurs more than once, all its occurrences except the first count as owned
        before.  No cluster may lie past the end of the file.

        Raises:
            NeedsCheckError: The file is too large for a bitmap, and would have more than
                `MAX_LISTED_CLUSTERS` owned clusters.
        """
        had_owner = np.zeros(len(clusters), np.bool_)
        order, ordered = None, clusters
        if len(clusters) > 1 and not (clusters[1:] > clusters[:-1]).all():
            order = self._order(clusters)
            ordered = clusters[order]
            had_owner[1:] = ordered[1:] == ordered[:-1]
        if self._map is not None:
            self._mark(ordered, had_owner)
        else:
            for owned in self._sorted:
                index = np.searchsorted(owned, ordered)
                index[index == len(owned)] = 0
                had_owner |= owned[index] == ordered
            self._list(ordered[~had_owner])
        self.count += int(len(clusters) - had_owner.sum())
        if order is None:
            return had_owner
        answer = np.empty_like(had_owner)
        answer[order] = had_owner
        return answer

    def _order(self, clusters: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Return the indices that sort clusters; equal ones stay in their order."""
        bits = len(clusters).bit_length()
        if self.clusters.bit_length() + bits > 64:  # noqa: PLR2004  bits of a word
            return np.argsort(clusters, kind="stable")
        # Sort words that consist of cluster and index, which is three times as fast as argsort.
        words = clusters << np.uint64(bits) | np.arange(len(clusters), dtype=np.uint64)
        words.sort()
        return (words & np.uint64((1 << bits) - 1)).astype(np.intp)

    def _mark(self, ordered: NDArray[np.uint64], had_owner: NDArray[np.bool_]) -> None:
        """Set the bits of sorted clusters; set ``had_owner`` for each whose bit was set before."""
        if self._map is None or not len(ordered):
            return
        offsets = (ordered >> np.uint64(3)).astype(np.intp)
        bits = np.left_shift(np.uint8(1), (ordered & np.uint64(7)).astype(np.uint8))
        had_owner |= (self._map[offsets] & bits) != 0
        # An indexed |= applies only one value to each byte, so combine the bits of a byte first.
        first = np.flatnonzero(np.concatenate(([True], offsets[1:] != offsets[:-1])))
        self._map[offsets[first]] |= np.bitwise_or.reduceat(bits, first)

    def _list(self, clusters: NDArray[np.uint64]) -> None:
        """Add a sorted array of clusters; arrays of similar length are merged."""
        if not len(clusters):
            return
        self._check_limit(len(clusters))
        while self._sorted and len(self._sorted[-1]) <= 2 * len(clusters):
            clusters = np.concatenate([self._sorted.pop(), clusters])
            clusters.sort(kind="stable")
        self._sorted.append(clusters)

    def _check_limit(self, more: int) -> None:
        """Raise NeedsCheckError if ``more`` further clusters would exceed the limit."""
        if self.count + more > MAX_LISTED_CLUSTERS:
            msg = (
                f"{self._name}: too large to check: found more than {MAX_LISTED_CLUSTERS} "
                f"references in a file of {self.clusters} clusters"
            )
            raise NeedsCheckError(msg)

    def claim_range(self, first: int, last: int) -> None:
        """Give an owner to the clusters from ``first`` to ``last``, exclusive.

        Clusters past the end of the file are ignored.

        Raises:
            NeedsCheckError: As for `claim`, but the limit is compared with the number of claims: a
                cluster of the range that already has an owner counts twice.
        """
        last = min(last, self.clusters)
        if first >= last:
            return
        if self._map is None:
            self._check_limit(last - first)
            self.claim(np.arange(first, last, dtype=np.uint64))
            return
        # A header can claim 2^31 clusters.  To bound the memory, set whole bytes without a list of
        # clusters.  The bits that were set already are counted in steps.
        first_byte, end_byte = min(-(-first // 8), last // 8), last // 8
        if first_byte * 8 < first:  # the range lies within one byte
            self.claim(np.arange(first, last, dtype=np.uint64))
            return
        for start in range(first_byte, end_byte, _ITEMS_PER_STEP):
            part = self._map[start : min(end_byte, start + _ITEMS_PER_STEP)]
            if part.any():
                self.count -= int(np.unpackbits(part).sum())
        self._map[first_byte:end_byte] = _FULL_BYTE
        self.count += 8 * (end_byte - first_byte)
        self.claim(np.arange(first, 8 * first_byte, dtype=np.uint64))
        self.claim(np.arange(8 * end_byte, last, dtype=np.uint64))

    def free_runs(self, end: int, limit: int) -> list[tuple[int, int]]:
        """Return the lowest runs of clusters without an owner below ``end``, at most ``limit``.

        ``end`` must not be past the end of the file.  A run is its first cluster and its length.
        """
        runs: list[tuple[int, int]] = []
        for first, count in self._unowned(end):
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            elif len(runs) == limit:
                break
            else:
                runs.append((first, count))
        return runs

    def owned(self, first: int, count: int) -> int:
        """Return which of ``count`` clusters have an owner: bit i stands for ``first`` + i.

        ``first`` may be negative; clusters outside the file have no owner.
        """
        low, high = max(0, first), min(first + count, self.clusters)
        if low >= high:
            return 0
        if self._map is not None:
            raw = self._map[low // 8 : -(-high // 8)].tobytes()
            bits = int.from_bytes(raw, "little") >> low % 8
        else:
            flags = np.zeros(high - low, np.uint8)
            for owned in self._sorted:
                span = np.searchsorted(owned, np.array([low, high], np.uint64))
                flags[(owned[span[0] : span[1]] - np.uint64(low)).astype(np.intp)] = 1
            bits = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
        return (bits & ((1 << (high - low)) - 1)) << (low - first)

    def end(self) -> int:
        """Return the number of the last cluster with an owner, plus 1; 0 if none has an owner."""
        if self._map is None:
            return max((int(owned[-1]) + 1 for owned in self._sorted), default=0)
        for start in range(len(self._map) - 1 & -_ITEMS_PER_STEP, -1, -_ITEMS_PER_STEP):
            owned = np.flatnonzero(self._map[start : start + _ITEMS_PER_STEP])
            if len(owned):
                last = start + int(owned[-1])
                return 8 * last + int(self._map[last]).bit_length()
        return 0

    def _unowned(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield runs of clusters below ``end`` without an owner; adjacent runs are not joined."""
        if self._map is None:
            yield from self._gaps(end)
            return
        for start in range(0, -(-end // 8), _ITEMS_PER_STEP):
            part = self._map[start : start + _ITEMS_PER_STEP]
            length = min(8 * len(part), end - 8 * start)
            if not part.any():
                yield 8 * start, length
            elif not (part == _FULL_BYTE).all():
                owned = np.unpackbits(part, bitorder="little")[:length]
                edges = np.flatnonzero(np.diff(owned, prepend=1, append=1))
                for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                    yield 8 * start + first, last - first

    def _gaps(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield the runs below ``end`` without an owner, from the sorted arrays of clusters."""
        owned = np.concatenate([*self._sorted, np.array([end], np.uint64)])
        owned.sort(kind="stable")
        owned = owned[: int(np.searchsorted(owned, np.uint64(end))) + 1]
        if owned[0]:
            yield 0, int(owned[0])
        for start in range(0, len(owned), _ITEMS_PER_STEP):
            part = owned[start : start + _ITEMS_PER_STEP + 1]
            for index in np.flatnonzero(np.diff(part) > 1).tolist():
                first = int(part[index]) + 1
                yield first, int(part[index + 1]) - first
