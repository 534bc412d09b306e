"""Images of any size that take little space: real tables, and data clusters that are holes.

A data cluster that was never written takes no space on the host, but its table entry is a
real one.  So an image with ten million clusters is created in a second, and takes only the
space of its tables.

The allocated clusters imitate a guest, which fills its disk in places.  The disk is divided
into areas of 32 MiB, whose entries fill a page of a table; some random areas are half full
(fuller if that is not enough), and the others are empty.  In the file the clusters are in
random order, the worst case for code that merges neighbours, or in runs that are in random
order.  The tables are before the data, in random order as well.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.geometry import Geometry
from qedfuse.ondisk.header import Header, build_header

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

GEOMETRY: Final = Geometry(cluster_size=65536, table_size=4)
AREA_CLUSTERS: Final = 512
"""Clusters of an area: their entries fill a page of 4096 bytes."""
_HEADER_END: Final = GEOMETRY.cluster_size


def choose(disk_clusters: int, wanted: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of the clusters of a disk to allocate, in ascending order.

    Raises:
        ValueError: The disk has fewer clusters than are wanted.
    """
    if wanted > disk_clusters:
        msg = f"clusters: found {wanted}, expected at most {disk_clusters}"
        raise ValueError(msg)
    areas = -(-disk_clusters // AREA_CLUSTERS)
    used = min(areas, -(-2 * wanted // AREA_CLUSTERS))
    while True:
        chosen = np.sort(random.permutation(areas)[:used])
        candidates = (chosen[:, None] * AREA_CLUSTERS + np.arange(AREA_CLUSTERS)).ravel()
        candidates = candidates[candidates < disk_clusters]
        if len(candidates) >= wanted:
            break
        used += 1  # the last area may be a short one
    # A random subset, without sorting millions of numbers.
    taken = np.zeros(len(candidates), np.bool_)
    taken[random.permutation(len(candidates))[:wanted]] = True
    clusters: NDArray[np.int64] = candidates[taken].astype(np.int64)
    return clusters


def build(
    path: Path, disk_bytes: int, wanted: int, seed: int = 1, run: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Create an image; return the numbers of its allocated clusters, and their file offsets.

    Args:
        path: The image, which is replaced.
        disk_bytes: The size of the disk.
        wanted: The number of allocated clusters.
        seed: The seed of the random choices.
        run: The number of clusters that are adjacent both in the file and on the disk.

    Raises:
        ValueError: The disk has fewer clusters than are wanted.
    """
    random = np.random.default_rng(seed)
    clusters = choose(GEOMETRY.clusters(disk_bytes), wanted, random)
    owners, starts = np.unique(clusters // GEOMETRY.entries, return_index=True)
    # The L1 table is the first after the header, the L2 tables follow.
    l1_offset = _HEADER_END
    l2_start = l1_offset + GEOMETRY.table_bytes
    tables = l2_start + random.permutation(len(owners)) * GEOMETRY.table_bytes
    data_start = l2_start + len(owners) * GEOMETRY.table_bytes
    runs = random.permutation(-(-wanted // run))
    positions = (runs[:, None] * run + np.arange(run)).ravel()
    offsets = data_start + positions[positions < wanted] * GEOMETRY.cluster_size
    header = Header(
        cluster_size=GEOMETRY.cluster_size,
        table_size=GEOMETRY.table_size,
        header_size=1,
        features=0,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=l1_offset,
        image_size=disk_bytes,
    )
    l1 = np.zeros(GEOMETRY.entries, "<u8")
    l1[owners] = tables
    with path.open("wb", buffering=0) as file:
        file.truncate(data_start + wanted * GEOMETRY.cluster_size)
        os.pwrite(file.fileno(), build_header(header), 0)
        os.pwrite(file.fileno(), l1.tobytes(), l1_offset)
        ends = [*starts[1:].tolist(), wanted]
        for table, first, last in zip(tables.tolist(), starts.tolist(), ends, strict=True):
            _write_table(file.fileno(), table, clusters[first:last], offsets[first:last])
    return clusters, offsets


def _write_table(
    descriptor: int, table: int, clusters: NDArray[np.int64], offsets: NDArray[np.int64]
) -> None:
    """Write the pages of an L2 table that have entries; the others remain holes."""
    entries = np.zeros(GEOMETRY.entries, "<u8")
    indices = clusters % GEOMETRY.entries
    entries[indices] = offsets
    for page in np.unique(indices // AREA_CLUSTERS).tolist():
        part = entries[page * AREA_CLUSTERS : (page + 1) * AREA_CLUSTERS]
        os.pwrite(descriptor, part.tobytes(), table + page * AREA_CLUSTERS * ENTRY_BYTES)
