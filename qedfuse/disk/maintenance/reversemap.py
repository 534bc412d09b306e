"""The reverse map: which L2 entries refer to the clusters of a range of the file.

The format does not record which entry refers to a cluster, so all tables may have to be read.  The
reading ends when the expected number of entries has been found.  Usually the range is at the end of
the file, and the tables that refer to it are near.  So the last table of the file is read first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from qedfuse.disk.lookup.slices import L2
from qedfuse.disk.space.l2tables import holding_data
from qedfuse.errors import CorruptImageError, HostError
from qedfuse.hostio.tablewalk import DataSlices
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES, decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import QedLayer

_READ_BYTES: Final = 1 << 20
"""Maximum number of bytes of a table that one call reads; other tasks run between the calls."""


class ReverseMap(NamedTuple):
    """Data clusters and the entries that refer to them, in the order of the clusters.

    Attributes:
        clusters: File offsets of the clusters, ascending.
        entries: For each cluster the file offset of the L2 entry that refers to it.
    """

    clusters: NDArray[np.uint64]
    entries: NDArray[np.uint64]


async def build_reverse_map(
    layer: QedLayer, low: int, high: int, expected: int | None = None
) -> ReverseMap:
    """Return the L2 entries that refer to file offsets from ``low`` up to ``high``, exclusive.

    No table may be dirty, and no other task may change a table meanwhile.

    Args:
        layer: The image.
        low: File offset of the first cluster.
        high: File offset just past the last cluster.
        expected: How many such entries a sound image has; the reading ends when they are found.
            With None all entries of the image are read and validated, and an invalid one marks the
            image as damaged.

    Raises:
        CorruptImageError: An entry does not point to the start of a cluster, or two entries
            point to the same cluster.
        HostError: The host cannot read a table, or the file ends within one.
    """
    length = layer.geometry.table_bytes
    step = min(_READ_BYTES if expected is not None else SLICE_BYTES, length)
    tables = layer.l2_tables
    with_data = await holding_data(layer.file, tables, length)
    clusters: list[NDArray[np.uint64]] = []
    entries: list[NDArray[np.uint64]] = []
    count = 0
    for table in tables[with_data][::-1].tolist():
        if expected is not None and count >= expected:
            break
        # `DataSlices` makes a checkpoint before each slice, so that other tasks can run and a
        # deadline can end the reading.
        async for offset in DataSlices(layer.file, table, length, slice_bytes=step):
            values = await _read(layer, table, offset, step, validated=expected is None)
            where = np.flatnonzero((values >= low) & (values < high))
            if len(where):
                clusters.append(values[where])
                entries.append(np.uint64(offset) + where.astype(np.uint64) * np.uint64(ENTRY_BYTES))
                count += len(where)
    return _in_order(layer, clusters, entries)


async def _read(
    layer: QedLayer, table: int, offset: int, length: int, *, validated: bool
) -> NDArray[np.uint64]:
    """Read ``length`` bytes of entries of a table, beginning at the file offset ``offset``.

    With ``validated`` the range must be one slice, which is read through the table cache.
    """
    if not validated:
        raw = await layer.file.pread(offset, length)
        if len(raw) < length:
            msg = f"{layer.file.name}: table at {table}: the file ends within it"
            raise HostError(msg)
        return np.frombuffer(decode(raw), np.uint64)
    index = (offset - table) // ENTRY_BYTES
    cached = layer.tables.cached(table, index)
    slice_ = cached or await layer.tables.load(table, index, L2)
    values = np.array(slice_.entries, np.uint64)
    if cached is None:
        layer.tables.evict(slice_)
    return values


def _in_order(
    layer: QedLayer, clusters: list[NDArray[np.uint64]], entries: list[NDArray[np.uint64]]
) -> ReverseMap:
    """Join the arrays of all slices in the order of the clusters; refuse entries that are wrong."""
    if not clusters:
        return ReverseMap(np.empty(0, np.uint64), np.empty(0, np.uint64))
    found, owners = np.concatenate(clusters), np.concatenate(entries)
    order = np.argsort(found)
    found, owners = found[order], owners[order]
    size = layer.geometry.cluster_size
    wrong = np.flatnonzero(found % np.uint64(size) != 0)
    if wrong.size:
        msg = (
            f"{layer.file.name}: L2 entry at {owners[wrong[0]]}: found {found[wrong[0]]}, expected "
            f"a multiple of {size}"
        )
        raise CorruptImageError(msg)
    twice = np.flatnonzero(found[1:] == found[:-1])
    if twice.size:
        msg = f"{layer.file.name}: cluster at {found[twice[0]]}: found two owners, expected one"
        raise CorruptImageError(msg)
    return ReverseMap(found, owners)
