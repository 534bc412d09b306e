"""Arithmetic on the runs of a free list: expanding runs to clusters, adding runs to a `FreeMap`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import trio

from qedfuse.disk.space.freemap import BLOCK_CLUSTERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.space.freemap import FreeMap
    from qedfuse.ondisk.freelist import Runs


def expand_runs(runs: Runs) -> NDArray[np.uint64]:
    """Return all clusters of ``runs``, in the order of the runs."""
    counts = runs[:, 1].astype(np.int64)
    ends = np.cumsum(counts)
    within = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    return np.repeat(runs[:, 0], counts) + within.astype(np.uint64)


async def add_runs(free_map: FreeMap, runs: Runs) -> None:
    """Add the clusters of ``runs`` to a map; the runs must ascend and not touch each other."""
    first = runs[:, 0].astype(np.int64) + free_map.alignment
    end = first + runs[:, 1].astype(np.int64)
    # Adding one run takes three microseconds, and a list can have a million runs.  So the runs
    # that lie within the same block of the map are added in one step.
    within = first // BLOCK_CLUSTERS == (end - 1) // BLOCK_CLUSTERS
    for cluster, count in runs[~within].tolist():
        free_map.add(cluster, count)
    first, end = first[within], end[within]
    edges = np.flatnonzero(np.diff(first // BLOCK_CLUSTERS, prepend=-1)).tolist()
    for low, high in pairwise([*edges, len(first)]):
        block = int(first[low]) // BLOCK_CLUSTERS
        free_map.add_block(
            block,
            _bits_of(first[low:high] % BLOCK_CLUSTERS, end[low:high] - block * BLOCK_CLUSTERS),
        )
        await trio.lowlevel.checkpoint()


def _bits_of(first: NDArray[np.int64], end: NDArray[np.int64]) -> int:
    """Return an integer in which the bits of ranges are set; the ranges must not touch."""
    change = np.zeros(BLOCK_CLUSTERS + 1, np.int8)
    change[first] = 1
    change[end] = -1
    ones = np.packbits(
        np.cumsum(change[:BLOCK_CLUSTERS], dtype=np.int8).view(np.uint8), bitorder="little"
    )
    return int.from_bytes(ones.tobytes(), "little")
