"""Detecting clusters of zeros in the data that a guest writes (``detect_zeroes``).

The search takes about 10 µs for each MiB.  The first word of a cluster rules out nearly all
clusters that hold other bytes.  For the rest the largest word decides, which numpy finds
faster than it compares a cluster with zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qedfuse.ondisk.geometry import Geometry


def find_zero_clusters(data: memoryview, start: int, geometry: Geometry) -> list[tuple[int, int]]:
    """Return the runs of whole clusters that hold only zeros: guest offsets of start and end.

    Args:
        data: The bytes to be written.
        start: The guest offset of ``data``.
        geometry: The geometry of the image.
    """
    size = geometry.cluster_size
    first, last = geometry.ceil(start), geometry.floor(start + len(data))
    if first >= last:
        return []
    words = np.frombuffer(data[first - start : last - start], np.uint64)
    clusters = words.reshape(-1, size // words.itemsize)
    maybe = np.flatnonzero(clusters[:, 0] == 0)
    if not len(maybe):
        return []
    if len(maybe) < len(clusters):
        clusters = clusters[maybe]
    found = maybe[clusters.max(axis=1) == 0]
    if not len(found):
        return []
    breaks = np.flatnonzero(np.diff(found) > 1) + 1
    return [
        (first + int(run[0]) * size, first + (int(run[-1]) + 1) * size)
        for run in np.split(found, breaks)
    ]
