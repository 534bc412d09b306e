"""A map of free clusters: one bit each, and quick answers to what the allocator asks.

The map is cut into blocks of 4096 clusters, each one Python integer; a block without a
free cluster takes no memory, and finding, taking or adding a run within a block is a
handful of operations on that integer.  All numbers here are clusters, not bytes.

A *place* is room for a table: as many neighbouring free clusters as a table has.  A run
has as many places as tables fit into it; a run ends at the border of a block.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BLOCK: Final = 4096
"""Clusters in a block; a multiple of the largest table."""

_FULL: Final = (1 << BLOCK) - 1


class FreeMap:
    """Which clusters of a file are free.

    Attributes:
        count: How many clusters are free.
        places: How many tables fit into them; 0 if that is not counted.
        table: Clusters in a table, a power of two up to 16.
        shift: A block begins at each cluster n for which n + shift is a multiple of
            `BLOCK`, and so does a table if they are laid side by side from ``anchor`` on.
    """

    def __init__(self, table: int = 1, anchor: int = 0, *, counted: bool = True) -> None:
        """Know of no free cluster; ``counted`` says whether somebody asks for the places.

        In scattered clusters counting them is most of the work.
        """
        self.table = table
        self.count = 0
        self.places = 0
        self._counted = counted
        self.shift = -anchor % table
        self._blocks: dict[int, int] = {}
        # Blocks with a free cluster, the lowest on top, each once; some have none any more.
        self._heap: list[int] = []
        self._in_heap: set[int] = set()

    def _put(self, block: int, old: int, new: int) -> None:
        """Replace a block's bits and keep the counters right."""
        self.count += new.bit_count() - old.bit_count()
        if self._counted:
            self.places += self._places(new, old ^ new) - self._places(old, old ^ new)
        if new:
            if not old and block not in self._in_heap:
                heapq.heappush(self._heap, block)
                self._in_heap.add(block)
            # Of a block that is wholly free there is one integer in all.
            self._blocks[block] = _FULL if new == _FULL else new
        else:
            self._blocks.pop(block, None)

    def _places(self, bits: int, changed: int) -> int:
        """Count the places in the runs of a block that touch what was changed."""
        if not changed:
            return 0
        # Only the changed part of the block, and the runs beside it, are looked at.
        low, high = _lowest_bit(changed), changed.bit_length()
        low -= _ones_below(bits, low)
        high += _lowest_bit(~(bits >> high))
        bits = bits >> low & ((1 << (high - low)) - 1)
        if self.table == 1:
            return bits.bit_count()
        # Only runs that are long enough are gone through one by one.
        bits = self._starts(bits)
        found = 0
        while bits:
            bits >>= _lowest_bit(bits)
            starts = _lowest_bit(~bits)
            found += (starts + self.table - 1) // self.table
            bits >>= starts
        return found

    def _starts(self, bits: int) -> int:
        """Give the bits of a block at which a table could begin."""
        step = 1
        while step < self.table:
            bits &= bits >> step
            step *= 2
        return bits

    def _parts(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Cut a run at the borders of blocks; give each block and a mask of its bits."""
        start, end = first + self.shift, first + count + self.shift
        while start < end:
            block, place = divmod(start, BLOCK)
            length = min(BLOCK - place, end - start)
            yield block, ((1 << length) - 1) << place
            start += length

    def add(self, first: int, count: int) -> None:
        """Note clusters as free, whether or not they were."""
        for block, mask in self._parts(first, count):
            old = self._blocks.get(block, 0)
            self._put(block, old, old | mask)

    def add_many(self, clusters: NDArray[np.uint64]) -> None:
        """Note clusters as free, in any order; the more at once, the less for each."""
        places = np.sort(clusters) + np.uint64(self.shift)
        blocks, starts = np.unique(places // BLOCK, return_index=True)
        flags = np.zeros(BLOCK, np.uint8)
        bounds = pairwise([*starts.tolist(), len(places)])
        for block, (first, last) in zip(blocks.tolist(), bounds, strict=True):
            inside = places[first:last] % BLOCK
            flags[inside] = 1
            bits = int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
            flags[inside] = 0
            self.add_block(block, bits)

    def add_block(self, block: int, bits: int) -> None:
        """Note the clusters of a block as free whose bits are set."""
        old = self._blocks.get(block, 0)
        self._put(block, old, old | bits)

    def pop_block(self) -> tuple[int, int] | None:
        """Take all free clusters of the lowest block that has any: its number and its bits."""
        first = self.lowest()
        if first is None:
            return None
        block = (first + self.shift) // BLOCK
        bits = self._blocks[block]
        self._put(block, bits, 0)
        return block, bits

    def bits(self, block: int) -> int:
        """Give the bits of a block; they are set where its clusters are free."""
        return self._blocks.get(block, 0)

    def remove(self, first: int, count: int) -> None:
        """Note clusters as not free, whether or not they were."""
        for block, mask in self._parts(first, count):
            old = self._blocks.get(block, 0)
            if old & mask:
                self._put(block, old, old & ~mask)

    def holds(self, first: int, count: int) -> int:
        """Tell how many clusters of a run are free."""
        return sum(
            (self._blocks.get(block, 0) & mask).bit_count()
            for block, mask in self._parts(first, count)
        )

    def lowest(self) -> int | None:
        """Give the lowest free cluster."""
        while self._heap and self._heap[0] not in self._blocks:
            self._in_heap.discard(heapq.heappop(self._heap))
        if not self._heap:
            return None
        block = self._heap[0]
        return self._cluster(block, _lowest_bit(self._blocks[block]))

    def _cluster(self, block: int, place: int) -> int:
        return block * BLOCK + place - self.shift

    def take(self, most: int) -> tuple[int, int] | None:
        """Take the lowest run, or the first ``most`` clusters of it.

        A run ends at the border of a block at the latest.

        Returns:
            Its first cluster and how many there are; None if nothing is free.
        """
        first = self.lowest()
        if first is None:
            return None
        block, place = divmod(first + self.shift, BLOCK)
        bits = self._blocks[block]
        count = min(most, _lowest_bit(~(bits >> place)))
        self._put(block, bits, bits & ~(((1 << count) - 1) << place))
        return first, count

    def take_rest(self) -> int | None:
        """Take the lowest free cluster that leaves as many places as there were."""
        for first, count in self._block_runs():
            if count % self.table:
                self.remove(first, 1)
                return first
        return None

    def find_place(self) -> int | None:
        """Give the first cluster of the lowest place for a table."""
        if self.places:
            for block in sorted(self._blocks):
                starts = self._starts(self._blocks[block])
                if starts:
                    return self._cluster(block, _lowest_bit(starts))
        return None

    def take_place(self) -> int | None:
        """Take the lowest place for a table."""
        first = self.find_place()
        if first is not None:
            self.remove(first, self.table)
        return first

    def find_run(self, count: int) -> int | None:
        """Give the first cluster of the lowest run of at least ``count`` clusters."""
        return next((first for first, length in self.runs() if length >= count), None)

    def before(self, end: int) -> int:
        """Count the free clusters that lie directly below the cluster ``end``."""
        position = end + self.shift
        found = 0
        while position > 0:
            block, place = divmod(position - 1, BLOCK)
            used = ~self._blocks.get(block, 0) & ((1 << (place + 1)) - 1)
            found += place + 1 - used.bit_length()
            if used:
                break
            position = block * BLOCK
        return found

    def tail_start(self, end: int, used: int) -> int:
        """Give the lowest cluster from which up to ``end`` at most ``used`` are not free.

        0 if there are no more than that in all.
        """
        position, left = end + self.shift, used
        while position > self.shift:
            block, place = divmod(position - 1, BLOCK)
            taken = ~self._blocks.get(block, 0) & ((1 << (place + 1)) - 1)
            count = taken.bit_count()
            if count > left:
                for _ in range(count - left - 1):
                    taken &= taken - 1
                return self._cluster(block, _lowest_bit(taken) + 1)
            left -= count
            position = block * BLOCK
        return 0

    def end(self) -> int:
        """Give the number past the last free cluster."""
        if not self._blocks:
            return 0
        block = max(self._blocks)
        return self._cluster(block, self._blocks[block].bit_length())

    def runs(self) -> Iterator[tuple[int, int]]:
        """List the runs of free clusters, lowest first, neighbours joined.

        Gives:
            The first cluster of each run and how many there are.
        """
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

    def take_from(self, start: int, most: int) -> tuple[int, int] | None:
        """Take the lowest run from the cluster ``start`` on, as `take` does."""
        block, place = divmod(start + self.shift, BLOCK)
        for candidate in sorted(at for at in self._blocks if at >= block):
            bits = self._blocks[candidate]
            if candidate == block:
                bits = bits >> place << place
            if bits:
                first = _lowest_bit(bits)
                count = min(most, _lowest_bit(~(bits >> first)))
                self.remove(self._cluster(candidate, first), count)
                return self._cluster(candidate, first), count
        return None

    def _block_runs(self) -> Iterator[tuple[int, int]]:
        """List the runs of each block, lowest first."""
        for block in sorted(self._blocks):
            bits = self._blocks[block]
            place = 0
            while bits:
                skip = _lowest_bit(bits)
                bits >>= skip
                place += skip
                length = _lowest_bit(~bits)
                bits >>= length
                yield self._cluster(block, place), length
                place += length


def _lowest_bit(bits: int) -> int:
    """Give the number of the lowest bit that is set; there is one."""
    return (bits & -bits).bit_length() - 1


def _ones_below(bits: int, place: int) -> int:
    """Count the bits that are set directly below a place."""
    return place - (~bits & ((1 << place) - 1)).bit_length()
