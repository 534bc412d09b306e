"""The map of free clusters agrees with a set of clusters."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qedfuse.disk.space.freemap import BLOCK_CLUSTERS, FreeMap
from tests.support.share import share

SIZES = (100, 5000, 13_000)
"""Files in clusters: within one block of the map, and across several."""


def runs(clusters: set[int]) -> list[tuple[int, int]]:
    """Return the runs of a set."""
    result: list[tuple[int, int]] = []
    for cluster in sorted(clusters):
        if result and sum(result[-1]) == cluster:
            result[-1] = (result[-1][0], result[-1][1] + 1)
        else:
            result.append((cluster, 1))
    return result


def block_runs(clusters: set[int], shift: int) -> list[tuple[int, int]]:
    """Return the runs of a set, split at the borders of blocks."""
    result: list[tuple[int, int]] = []
    for cluster in sorted(clusters):
        if result and sum(result[-1]) == cluster and (cluster + shift) % BLOCK_CLUSTERS:
            result[-1] = (result[-1][0], result[-1][1] + 1)
        else:
            result.append((cluster, 1))
    return result


class Model:
    """A map and the set that it should be equal to."""

    def __init__(self, choice: random.Random) -> None:
        """Choose tables and a size."""
        self.choice = choice
        self.table = choice.choice((1, 2, 4, 8, 16))
        self.size = choice.choice(SIZES)
        self.map = FreeMap(self.table, choice.randrange(40))
        self.free: set[int] = set()

    def step(self) -> None:
        """Do one thing to both and compare the answers."""
        first = self.choice.randrange(self.size)
        count = min(self.size - first, self.choice.choice((1, 2, 5, 17, 300, 6000)))
        some = set(range(first, first + count))
        parts = block_runs(self.free, self.map.alignment)
        match self.choice.randrange(7):
            case 0 | 1:
                self.map.add(first, count)
                self.free |= some
            case 2:
                assert self.map.count_free(first, count) == len(self.free & some)
                self.map.remove(first, count)
                self.free -= some
            case 3:
                taken = self.map.take(count)
                assert (taken is None) == (not self.free)
                if taken is not None:
                    lowest, length = runs(self.free)[0]
                    assert taken[0] == lowest
                    assert 0 < taken[1] <= min(count, length)
                    self.free -= set(range(lowest, lowest + taken[1]))
            case 4:
                many = self.choice.choices(range(self.size), k=count)
                self.map.add_many(np.array(many, np.uint64))
                self.free |= set(many)
            case 5:
                odd = [start for start, length in parts if length % self.table]
                assert self.map.take_outside_slots() == min(odd, default=None)
                self.free -= {min(odd, default=-1)}
            case _:
                wide = [start for start, length in parts if length >= self.table]
                start = min(wide, default=None)
                assert self.map.take_slot() == start
                if start is not None:
                    self.free -= set(range(start, start + self.table))

    def compare(self) -> None:
        """Compare what the map says of itself."""
        parts = block_runs(self.free, self.map.alignment)
        assert self.map.count == len(self.free)
        assert self.map.slots == sum(length // self.table for _, length in parts)
        assert self.map.lowest() == min(self.free, default=None)
        assert self.map.end() == max(self.free, default=-1) + 1
        found = runs(self.free)
        assert list(self.map.runs()) == found
        for length in (1, 3, 9):
            first = next((first for first, count in found if count >= length), None)
            assert self.map.find_run(length) == first
        end = self.choice.randrange(self.size + 1)
        before = 0
        while end - 1 - before in self.free:
            before += 1
        assert self.map.count_below(end) == before


@pytest.mark.parametrize("seed", range(share(15, of=40)))
def test_map_and_set_agree(seed: int) -> None:
    """After any operations the map and the set give the same answers."""
    model = Model(random.Random(seed))
    for _ in range(60):
        model.step()
        if model.choice.random() < 0.3:
            model.compare()
    model.compare()


def test_a_block_without_free_clusters_costs_nothing() -> None:
    """A block without free clusters takes no memory."""
    free = FreeMap(4, 5)
    free.add(0, 1 << 20)
    assert len(free._blocks) == (1 << 20) // BLOCK_CLUSTERS + 1
    free.remove(0, 1 << 20)
    assert (free._blocks, free.count, free.slots, free.lowest()) == ({}, 0, 0, None)
    assert free._heap == []


def test_a_block_that_comes_and_goes_is_kept_once() -> None:
    """The memory depends on the number of blocks, not on how often they became free."""
    free = FreeMap(1)
    free.add(0, 1)
    for _ in range(1000):
        free.add(BLOCK_CLUSTERS, 3)
        free.remove(BLOCK_CLUSTERS, 3)
    assert len(free._heap) == len(free._in_heap) == 2
    assert free.take(1) == (0, 1)
    assert free.lowest() is None
    free.add(BLOCK_CLUSTERS, 3)
    assert free.take(9) == (BLOCK_CLUSTERS, 3)
    assert (free.lowest(), free._heap, free._in_heap) == (None, [], set())


def test_taking_from_somewhere_on() -> None:
    """Taking from a cluster on gives the lowest run at or past it."""
    free = FreeMap(4)
    free.add(9, 8)
    free.add(BLOCK_CLUSTERS + 7, 2)
    assert free.take_from(12, 3) == (12, 3)
    assert free.take_from(15, 9) == (15, 2)
    assert free.take_from(17, 9) == (BLOCK_CLUSTERS + 7, 2)
    assert free.take_from(17, 9) is None
    assert list(free.runs()) == [(9, 3)]
