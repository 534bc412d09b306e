"""The L2 tables of an image as a whole: where they lie, and which of them hold anything.

An L1 table can be 1 GiB and name 134 million tables, all of them holes of a sparse file:
what is done for each is done on arrays, and other tasks run in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.space.ownerbitmap import OwnerBitmap
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

_STEP: Final = 1 << 13
"""Tables that are handled before other tasks get a turn."""


async def filled(file: HostFile, tables: NDArray[np.uint64], table_bytes: int) -> NDArray[np.bool_]:
    """Tell which of some tables, sorted by file offset and apart, are not mere holes.

    It costs one question to the host for each stretch of data, however many tables are
    holes.
    """
    answer = np.zeros(len(tables), np.bool_)
    place = 0
    while place < len(tables):
        data = await file.next_data(int(tables[place]))
        if data is None:
            break
        # Tables that end before the data are holes.
        if data >= table_bytes:
            behind = np.searchsorted(tables, np.uint64(data - table_bytes), "right")
            place = max(place, int(behind))
        if place < len(tables) and tables[place] <= data:
            answer[place] = True
            place += 1
        await trio.lowlevel.checkpoint()
    return answer


async def claim_tables(
    references: OwnerBitmap, tables: NDArray[np.uint64], geometry: Geometry
) -> None:
    """Mark the clusters of tables as used, as far as the file goes."""
    within = np.arange(geometry.table_size, dtype=np.uint64)
    for start in range(0, len(tables), _STEP):
        first = tables[start : start + _STEP] >> np.uint64(geometry.cluster_bits)
        clusters = (first[:, np.newaxis] + within).ravel()
        references.claim(clusters[clusters < references.clusters])
        await trio.lowlevel.checkpoint()
