"""Detecting clusters of zeros in the data that a guest writes (``detect_zeroes``).

The search takes about 10 µs for each MiB.  Nearly all clusters with data are excluded first: their
first word (8 bytes) is not 0.  A remaining cluster holds only zeros if its largest word is 0.  In
numpy this is faster than comparing all words with 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qedfuse.ondisk.geometry import Geometry


def find_zero_clusters(data: memoryview, start: int, geometry: Geometry) -> list[tuple[int, int]]:
    """Return the runs of guest clusters to which ``data`` would write only zeros.

    Only clusters that ``data`` covers completely count.

    Args:
        data: The bytes that will be written.
        start: Guest offset of ``data``.
        geometry: The geometry of the image.

    Returns:
        The guest offsets of the start and the end of each run, in ascending order.
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
