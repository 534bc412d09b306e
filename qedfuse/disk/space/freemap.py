"""A bitmap of free clusters, in which the allocator quickly finds runs and table slots.

The map is divided into blocks of 4096 clusters, and each block is one Python integer.  The lowest
bit stands for the first cluster of the block; a set bit means that the cluster is free.  All
positions and lengths in this module are in clusters.

A *table slot* is a run of free clusters as long as a table.  When slots are counted, a run that
crosses the border of two blocks counts as two runs.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BLOCK_CLUSTERS: Final = 4096
"""Number of clusters in a block; a multiple of the length of the largest table."""

_FULL_BLOCK: Final = (1 << BLOCK_CLUSTERS) - 1
"""The integer of a block in which every cluster is free."""


class FreeMap:
    """Which clusters of a file are free.

    Attributes:
        count: How many clusters are free.
        slots: How many tables fit into the free runs; 0 if slots are not counted.
        table_clusters: Number of clusters in a table, a power of two up to 16.
        alignment: A block begins at each cluster n for which n + alignment is a multiple of
            `BLOCK_CLUSTERS`.
    """

    def __init__(
        self, table_clusters: int = 1, anchor: int = 0, *, counts_slots: bool = True
    ) -> None:
        """Make a map without a free cluster.

        Args:
            table_clusters: Number of clusters in a table.
            anchor: A cluster at which a row of adjacent tables can begin.  No table of the row
                crosses the border of a block.
            counts_slots: Whether to maintain `slots`.  If the free clusters are scattered, this is
                most of the work of a change.
        """
        self.table_clusters = table_clusters
        self.count = 0
        self.slots = 0
        self._counts_slots = counts_slots
        self.alignment = -anchor % table_clusters
        self._blocks: dict[int, int] = {}
        # A heap of block numbers, the lowest on top, without duplicates.  The heap has every block
        # with a free cluster, and perhaps blocks without one, which `lowest` removes.
        self._heap: list[int] = []
        self._in_heap: set[int] = set()

    def empty_like(self) -> FreeMap:
        """Return an empty map that has the same block borders and does not count slots."""
        # An anchor of -alignment results in the same alignment.
        return FreeMap(self.table_clusters, -self.alignment, counts_slots=False)

    def _set_bits(self, block: int, old: int, new: int) -> None:
        """Change all bits of a block from ``old`` to ``new``, and update the counters."""
        self.count += new.bit_count() - old.bit_count()
        if self._counts_slots:
            self.slots += self._slots(new, old ^ new) - self._slots(old, old ^ new)
        if new:
            if not old and block not in self._in_heap:
                heapq.heappush(self._heap, block)
                self._in_heap.add(block)
            # All blocks that are entirely free share one integer.
            self._blocks[block] = _FULL_BLOCK if new == _FULL_BLOCK else new
        else:
            self._blocks.pop(block, None)

    def _slots(self, bits: int, changed: int) -> int:
        """Count the slots in those runs of a block that the bits ``changed`` can affect."""
        if not changed:
            return 0
        # Examine the part from the lowest to the highest changed bit, and the runs that touch it.
        low, high = _lowest_bit(changed), changed.bit_length()
        low -= _ones_below(bits, low)
        high += _lowest_bit(~(bits >> high))
        bits = bits >> low & ((1 << (high - low)) - 1)
        if self.table_clusters == 1:
            return bits.bit_count()
        # Keep the bits at which a table could begin.  A run of n such bits stands for
        # n + table_clusters - 1 free clusters.
        bits = self._slot_starts(bits)
        found = 0
        while bits:
            bits >>= _lowest_bit(bits)
            starts = _lowest_bit(~bits)
            found += (starts + self.table_clusters - 1) // self.table_clusters
            bits >>= starts
        return found

    def _slot_starts(self, bits: int) -> int:
        """Return the bits of those clusters of a block at which a table could begin."""
        step = 1
        while step < self.table_clusters:
            bits &= bits >> step
            step *= 2
        return bits

    def _split(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Split a run at the borders of blocks; yield each block and a mask of its bits."""
        start, end = first + self.alignment, first + count + self.alignment
        while start < end:
            block, bit = divmod(start, BLOCK_CLUSTERS)
            length = min(BLOCK_CLUSTERS - bit, end - start)
            yield block, ((1 << length) - 1) << bit
            start += length

    def add(self, first: int, count: int) -> None:
        """Make a run of clusters free; some of them may be free already."""
        for block, mask in self._split(first, count):
            old = self._blocks.get(block, 0)
            self._set_bits(block, old, old | mask)

    def add_many(self, clusters: NDArray[np.uint64]) -> None:
        """Make clusters free, in any order; cheaper than a call of `add` for each."""
        positions = np.sort(clusters) + np.uint64(self.alignment)
        blocks, starts = np.unique(positions // BLOCK_CLUSTERS, return_index=True)
        flags = np.zeros(BLOCK_CLUSTERS, np.uint8)
        bounds = pairwise([*starts.tolist(), len(positions)])
        for block, (first, last) in zip(blocks.tolist(), bounds, strict=True):
            inside = positions[first:last] % BLOCK_CLUSTERS
            flags[inside] = 1
            bits = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
            flags[inside] = 0
            self.add_block(block, bits)

    def add_block(self, block: int, bits: int) -> None:
        """Free the clusters for which a bit is set in ``bits``."""
        old = self._blocks.get(block, 0)
        self._set_bits(block, old, old | bits)

    def pop_block(self) -> tuple[int, int] | None:
        """Remove all free clusters of the lowest block that has any.

        Returns:
            The number of the block and its bits; None if the map is empty.
        """
        first = self.lowest()
        if first is None:
            return None
        block = (first + self.alignment) // BLOCK_CLUSTERS
        bits = self._blocks[block]
        self._set_bits(block, bits, 0)
        return block, bits

    def bits(self, block: int) -> int:
        """Return the bits of a block, set where a cluster is free."""
        return self._blocks.get(block, 0)

    def remove(self, first: int, count: int) -> None:
        """Remove a run of clusters from the map; clusters that are not free are ignored."""
        for block, mask in self._split(first, count):
            old = self._blocks.get(block, 0)
            if old & mask:
                self._set_bits(block, old, old & ~mask)

    def count_free(self, first: int, count: int) -> int:
        """Count the free clusters of a run."""
        return sum(
            (self._blocks.get(block, 0) & mask).bit_count()
            for block, mask in self._split(first, count)
        )

    def lowest(self) -> int | None:
        """Return the lowest free cluster; None if there is none."""
        while self._heap and self._heap[0] not in self._blocks:
            self._in_heap.discard(heapq.heappop(self._heap))
        if not self._heap:
            return None
        block = self._heap[0]
        return self._cluster(block, _lowest_bit(self._blocks[block]))

    def _cluster(self, block: int, bit: int) -> int:
        """Return the cluster for which a bit of a block stands."""
        return block * BLOCK_CLUSTERS + bit - self.alignment

    def take(self, limit: int) -> tuple[int, int] | None:
        """Remove the lowest run, or only its first ``limit`` clusters, from the map.

        A run ends at the border of a block.

        Returns:
            The first cluster and the number of removed clusters; None if none is free.
        """
        first = self.lowest()
        if first is None:
            return None
        block, bit = divmod(first + self.alignment, BLOCK_CLUSTERS)
        bits = self._blocks[block]
        count = min(limit, _lowest_bit(~(bits >> bit)))
        self._set_bits(block, bits, bits & ~(((1 << count) - 1) << bit))
        return first, count

    def take_outside_slots(self) -> int | None:
        """Remove and return the lowest free cluster that no slot needs; None without one."""
        for first, count in self._block_runs():
            if count % self.table_clusters:
                self.remove(first, 1)
                return first
        return None

    def find_slot(self) -> int | None:
        """Return the first cluster of the lowest table slot; None if `slots` is 0."""
        if self.slots:
            for block in sorted(self._blocks):
                starts = self._slot_starts(self._blocks[block])
                if starts:
                    return self._cluster(block, _lowest_bit(starts))
        return None

    def take_slot(self) -> int | None:
        """Remove the lowest slot; return its first cluster, None without a slot."""
        first = self.find_slot()
        if first is not None:
            self.remove(first, self.table_clusters)
        return first

    def find_run(self, count: int) -> int | None:
        """Return the start of the lowest run of at least ``count`` clusters; None without one."""
        return next((first for first, length in self.runs() if length >= count), None)

    def count_below(self, end: int) -> int:
        """Return the length of the free run directly below the cluster ``end``; 0 without one."""
        position = end + self.alignment
        found = 0
        while position > 0:
            block, bit = divmod(position - 1, BLOCK_CLUSTERS)
            used = ~self._blocks.get(block, 0) & ((1 << (bit + 1)) - 1)
            found += bit + 1 - used.bit_length()
            if used:
                break
            position = block * BLOCK_CLUSTERS
        return found

    def tail_start(self, end: int, max_used: int) -> int:
        """Return the start of the longest range directly below ``end`` with few used clusters.

        A used cluster is one that is not free; the range has at most ``max_used`` of them.
        """
        position, left = end + self.alignment, max_used
        while position > self.alignment:
            block, bit = divmod(position - 1, BLOCK_CLUSTERS)
            used = ~self._blocks.get(block, 0) & ((1 << (bit + 1)) - 1)
            if block == 0:
                # The lowest bits of block 0 stand for no cluster.
                used = used >> self.alignment << self.alignment
            count = used.bit_count()
            if count > left:
                for _ in range(count - left - 1):
                    used &= used - 1
                return self._cluster(block, _lowest_bit(used) + 1)
            left -= count
            position = block * BLOCK_CLUSTERS
        return 0

    def end(self) -> int:
        """Return the number of the last free cluster plus 1; 0 if no cluster is free."""
        if not self._blocks:
            return 0
        block = max(self._blocks)
        return self._cluster(block, self._blocks[block].bit_length())

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the start and length of each free run, lowest first, joined across blocks."""
        first = count = 0
        for start, length in self._block_runs():
            if count and first + count == start:
                count += length
                continue
            if count:
                yield first, count
            first, count = start, length
        if count:
            yield first, count

    def take_from(self, start: int, limit: int) -> tuple[int, int] | None:
        """Remove the lowest run at or past ``start``, or only its first ``limit`` clusters.

        Of a run that begins before ``start``, only the part from ``start`` on counts.  A run ends
        at the border of a block.

        Returns:
            The first cluster and the number of removed clusters; None without a run.
        """
        block, bit = divmod(start + self.alignment, BLOCK_CLUSTERS)
        for candidate in sorted(number for number in self._blocks if number >= block):
            bits = self._blocks[candidate]
            if candidate == block:
                bits = bits >> bit << bit
            if bits:
                first = _lowest_bit(bits)
                count = min(limit, _lowest_bit(~(bits >> first)))
                self.remove(self._cluster(candidate, first), count)
                return self._cluster(candidate, first), count
        return None

    def _block_runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of free clusters, lowest first, split at the borders of blocks."""
        for block in sorted(self._blocks):
            bits = self._blocks[block]
            position = 0
            while bits:
                skip = _lowest_bit(bits)
                bits >>= skip
                position += skip
                length = _lowest_bit(~bits)
                bits >>= length
                yield self._cluster(block, position), length
                position += length


def _lowest_bit(bits: int) -> int:
    """Return the number of the lowest set bit; at least one must be set."""
    return (bits & -bits).bit_length() - 1


def _ones_below(bits: int, position: int) -> int:
    """Return the length of the run of set bits that ends directly below a bit position."""
    return position - (~bits & ((1 << position) - 1)).bit_length()
