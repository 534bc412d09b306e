"""Work on all L2 tables of an image: which of them hold data, and which clusters they take.

An L1 table can be 1 GiB and name 134 million tables, all of them holes of a sparse file.
So the work for each table is done on arrays, and other tasks run in between.
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
"""Tables that are claimed before other tasks run."""


async def holding_data(
    file: HostFile, tables: NDArray[np.uint64], table_bytes: int
) -> NDArray[np.bool_]:
    """Return which of some tables hold data and are not entirely holes of the host's file.

    ``tables`` are file offsets, ascending, of tables that do not overlap.  Costs one query
    to the host for each stretch of data, however many tables are holes.
    """
    answer = np.zeros(len(tables), np.bool_)
    index = 0
    while index < len(tables):
        data = await file.next_data(int(tables[index]))
        if data is None:
            break
        # Tables that end before the data are holes.
        if data >= table_bytes:
            behind = np.searchsorted(tables, np.uint64(data - table_bytes), "right")
            index = max(index, int(behind))
        if index < len(tables) and tables[index] <= data:
            answer[index] = True
            index += 1
        await trio.lowlevel.checkpoint()
    return answer


async def claim_tables(owners: OwnerBitmap, tables: NDArray[np.uint64], geometry: Geometry) -> None:
    """Mark the clusters of tables at file offsets as owned, as far as the file reaches."""
    within = np.arange(geometry.table_size, dtype=np.uint64)
    for start in range(0, len(tables), _TABLES_PER_STEP):
        first = tables[start : start + _TABLES_PER_STEP] >> np.uint64(geometry.cluster_bits)
        clusters = (first[:, np.newaxis] + within).ravel()
        owners.claim(clusters[clusters < owners.clusters])
        await trio.lowlevel.checkpoint()
