"""Which L2 entries refer to clusters of a range of the file: one pass over the tables.

The format has no way back from a cluster to its entry, so all tables may have to be read.
A caller that knows how many entries there are gets them as soon as they are found; the
tables are read from the end of the file on, because what was allocated last lies there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from qedfuse.disk.lookup.tablecache import L2
from qedfuse.disk.space.l2tables import holding_data
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES, decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import QedLayer

_READ_BYTES: Final = 1 << 20
"""Most of a table that is read at once; other tasks get a turn in between."""


class ReverseMap(NamedTuple):
    """Data clusters and the entries that refer to them, by the order of the clusters.

    Attributes:
        clusters: File offsets of the clusters, ascending.
        entries: File offsets of the L2 entries.
    """

    clusters: NDArray[np.uint64]
    entries: NDArray[np.uint64]


async def build_reverse_map(
    layer: QedLayer, low: int, high: int, expected: int | None = None
) -> ReverseMap:
    """Find the L2 entries that refer to file offsets from ``low`` up to ``high``.

    Every change of the tables must have been written back, and nothing may change them
    meanwhile.

    Args:
        layer: The image.
        low: File offset.
        high: File offset.
        expected: How many entries there are in a sound image: the pass ends as soon as so
            many are found.  With None each entry of the image is looked at and judged.

    Raises:
        CorruptImageError: An entry points into a cluster, or two into the same.
        HostError: The host cannot read a table.
    """
    length = layer.geometry.table_bytes
    step = min(_READ_BYTES if expected is not None else SLICE_BYTES, length)
    tables = layer.l2_tables
    held = await holding_data(layer.file, tables, length)
    clusters: list[NDArray[np.uint64]] = []
    entries: list[NDArray[np.uint64]] = []
    count = 0
    for table in tables[held][::-1].tolist():
        if expected is not None and count >= expected:
            break
        # A deadline may end the pass before each slice, and other tasks run.
        async for offset in DataSlices(layer.file, table, length, slice_bytes=step):
            values = await _read(layer, table, offset, step, judged=expected is None)
            where = np.flatnonzero((values >= low) & (values < high))
            if len(where):
                clusters.append(values[where])
                entries.append(np.uint64(offset) + where.astype(np.uint64) * np.uint64(ENTRY_BYTES))
                count += len(where)
    return _in_order(layer, clusters, entries)


async def _read(
    layer: QedLayer, table: int, offset: int, length: int, *, judged: bool
) -> NDArray[np.uint64]:
    """Read entries of a table from a file offset on, judged as for every other reader or raw."""
    if not judged:
        return np.frombuffer(decode(await layer.file.pread(offset, length)), np.uint64)
    index = (offset - table) // ENTRY_BYTES
    cached = layer.tables.cached(table, index)
    part = cached or await layer.tables.load(table, index, L2)
    values = np.array(part.entries, np.uint64)
    if cached is None:
        layer.tables.evict(part)
    return values


def _in_order(
    layer: QedLayer, clusters: list[NDArray[np.uint64]], entries: list[NDArray[np.uint64]]
) -> ReverseMap:
    """Sort what was found by clusters; refuse what a sound image does not have."""
    if not clusters:
        return ReverseMap(np.empty(0, np.uint64), np.empty(0, np.uint64))
    found, places = np.concatenate(clusters), np.concatenate(entries)
    order = np.argsort(found)
    found, places = found[order], places[order]
    size = layer.geometry.cluster_size
    wrong = np.flatnonzero(found % np.uint64(size) != 0)
    if wrong.size:
        msg = (
            f"{layer.file.name}: L2 entry at {places[wrong[0]]}: found {found[wrong[0]]}, expected "
            f"a multiple of {size}"
        )
        raise CorruptImageError(msg)
    twice = np.flatnonzero(found[1:] == found[:-1])
    if twice.size:
        msg = f"{layer.file.name}: cluster at {found[twice[0]]}: found two owners, expected one"
        raise CorruptImageError(msg)
    return ReverseMap(found, places)
