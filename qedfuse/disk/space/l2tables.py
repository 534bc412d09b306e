"""Operations on many L2 tables: find those that hold data, and mark clusters of tables as owned.

An L1 table can point to 134 million tables, all of them holes of a sparse file.  So these functions
process arrays of tables, and let other tasks run between two steps.
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

_TABLES_PER_STEP: Final = 1 << 13
"""Maximum number of tables whose clusters are marked as owned before other tasks run."""


async def holding_data(
    file: HostFile, tables: NDArray[np.uint64], table_bytes: int
) -> NDArray[np.bool_]:
    """Return for each table whether it holds data; if not, it is a hole of the host's file.

    ``tables`` are the file offsets of tables that do not overlap, in ascending order.  One query to
    the host skips all tables that are holes up to the next data.

    Raises:
        HostError: A system call failed.
    """
    answer = np.zeros(len(tables), np.bool_)
    index = 0
    while index < len(tables):
        data = await file.next_data(int(tables[index]))
        if data is None:
            break
        # Skip the tables that end at or before the next data: they are holes.
        if data >= table_bytes:
            behind = np.searchsorted(tables, np.uint64(data - table_bytes), "right")
            index = max(index, int(behind))
        if index < len(tables) and tables[index] <= data:
            answer[index] = True
            index += 1
        await trio.lowlevel.checkpoint()
    return answer


async def claim_tables(owners: OwnerBitmap, tables: NDArray[np.uint64], geometry: Geometry) -> None:
    """Mark the clusters of the tables at ``tables`` as owned, except those past the file's end.

    Raises:
        NeedsCheckError: See `OwnerBitmap.claim`.
    """
    within = np.arange(geometry.table_size, dtype=np.uint64)
    for start in range(0, len(tables), _TABLES_PER_STEP):
        first = tables[start : start + _TABLES_PER_STEP] >> np.uint64(geometry.cluster_bits)
        clusters = (first[:, np.newaxis] + within).ravel()
        owners.claim(clusters[clusters < owners.clusters])
        await trio.lowlevel.checkpoint()
