"""How one layer of a chain stores a range of the disk, as arrays of runs.

`Layer.lookup` makes an object for each extent, which is too slow for millions of extents.  This
module classifies the entries of up to 256 KiB of an L2 table together with numpy.  In a raw file it
also finds the holes, which `RawLayer.lookup` reports as data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.lookup.slices import L2
from qedfuse.ondisk.constants import ENTRY_BYTES, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer, QedLayer

    Array = NDArray[np.int64]

UNALLOCATED: Final = 0
"""Kind of a run that the layer does not store."""
ZEROS: Final = 1
"""Kind of a run of zero clusters, which have no offset in the file."""
DATA: Final = 2
"""Kind of a run of data at an offset of the file."""
HOLE: Final = 3
"""Kind of a hole of a raw file, which reads as zeros and has an offset in the file."""
BAD: Final = 4
"""Kind of the range of an invalid table entry."""

_MAX_TABLE_READ_BYTES: Final = 1 << 18
"""Maximum number of bytes of a table in one read."""
_MAX_TABLE_READS_PER_CALL: Final = 4
"""Maximum number of reads of L2 tables in one call of `QedRunReader.read`."""
_MAX_RAW_RUNS_PER_CALL: Final = 1 << 16
"""Maximum number of runs that one call of `RawRunReader.read` returns."""


@dataclass(slots=True)
class Runs:
    """Adjacent runs of a layer, as arrays of equal length.

    Attributes:
        starts: Guest offset of each run in bytes.
        kinds: `UNALLOCATED`, `ZEROS`, `DATA`, `HOLE` or `BAD` for each run.
        offsets: File offset in bytes of a run of kind `DATA` or `HOLE`; for `BAD` the guest offset
            where the range of the invalid entry begins.  Meaningless for the other kinds.
        end: Guest offset in bytes where the last run ends.
    """

    starts: Array
    kinds: NDArray[np.uint8]
    offsets: Array
    end: int


class QedRunReader:
    """Reads the runs of a QED image from the tables of the image.

    Attributes:
        size: Bytes of the disk.
        name: Name of the image in messages.
    """

    def __init__(self, layer: QedLayer) -> None:
        """Make a reader of an open layer, whose `scan_l1` was called."""
        self._layer = layer
        self._geometry = layer.geometry
        self.size = layer.size
        self.name = layer.file.name

    async def read(self, start: int, end: int) -> Runs:
        """Return the runs from ``start`` on, up to ``end`` or an earlier offset.

        The range must lie within the disk, and must not be empty; the result has at least one run.

        Raises:
            HostError: The host cannot read the file.
        """
        geometry, layer = self._geometry, self._layer
        found: list[Runs] = []
        at = start
        for _ in range(_MAX_TABLE_READS_PER_CALL):
            if at >= end:
                break
            l1_index = geometry.l1_index(at)
            table_offset, reason = await layer.table_at(l1_index)
            stop = min(end, (l1_index + 1) * geometry.table_span)
            if reason:
                runs = _single(at, BAD, stop, l1_index * geometry.table_span)
            elif not table_offset:
                following_index = layer.skip_missing_tables(l1_index)
                stop = min(end, max(stop, following_index * geometry.table_span))
                runs = _single(at, UNALLOCATED, stop)
            else:
                runs = await self._in_table(table_offset, at, stop)
            found.append(runs)
            at = runs.end
        return _concatenate(found)

    async def _in_table(self, table_offset: int, start: int, end: int) -> Runs:
        """Return the runs from ``start`` on that one read of an L2 table describes.

        Entries in a long hole of the file are 0, so they are not read.  If another program has
        truncated the file, the entries past its end count as 0.  The range must lie in one table.
        """
        geometry = self._geometry
        position = table_offset + geometry.l2_index(start) * ENTRY_BYTES
        entries_end = table_offset + (geometry.l2_index(end - 1) + 1) * ENTRY_BYTES
        data = await self._layer.file.next_data(position)
        if data is None or data >= entries_end:
            return _single(start, UNALLOCATED, end)
        if data - position >= _MAX_TABLE_READ_BYTES:
            count = (data - position) // ENTRY_BYTES
            return _single(
                start, UNALLOCATED, geometry.floor(start) + count * geometry.cluster_size
            )
        length = min(_MAX_TABLE_READ_BYTES, entries_end - position)
        values = _entries(await self._layer.file.pread(position, length))
        if not len(values):
            return _single(start, UNALLOCATED, end)
        stop = min(end, geometry.floor(start) + len(values) * geometry.cluster_size)
        return self._runs(values, start, stop)

    def _runs(self, values: Array, start: int, end: int) -> Runs:
        """Join the entries of a range into the longest runs; each invalid entry is its own run.

        ``values`` begins with the entry of the cluster that contains ``start``.
        """
        size = self._geometry.cluster_size
        # The entries 0 and 1 are equal to their kinds.  Every greater entry is `DATA` (2).
        kinds = np.minimum(values.view(np.uint64), DATA).astype(np.uint8)
        before, after = values[:-1], values[1:]
        joined = (after - before == size) & (kinds[:-1] == DATA) & (kinds[1:] == DATA)
        joined |= (after == before) & (kinds[1:] != DATA)
        bad = self._layer.registry.entry_rules(L2).invalid_mask(values.view(np.uint64))
        if bad is not None:
            kinds[bad] = BAD
            joined &= ~(bad[:-1] | bad[1:])
        first = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        starts = self._geometry.floor(start) + first * size
        kinds = kinds[first]
        offsets = values[first]
        if bad is not None:
            offsets = np.where(kinds == BAD, starts, offsets)
        within = start - int(starts[0])
        starts[0] = start
        if kinds[0] == DATA:
            offsets[0] += within
        return Runs(starts, kinds, offsets, end)


class RawRunReader:
    """Reads the runs of a raw file: data and holes.

    Attributes:
        size: Bytes of the disk, a multiple of the sector size.
        name: Name of the file in messages.
    """

    def __init__(self, layer: Layer) -> None:
        """Make a reader of an open layer, which the caller must close after the last read."""
        self._file = layer.file
        # Rounded up to whole sectors, as in QEMU.
        self.size = -(-layer.size // SECTOR) * SECTOR
        self.name = layer.file.name

    async def read(self, start: int, end: int) -> Runs:
        """Return the runs from ``start`` on, up to ``end`` or an earlier offset.

        The range must lie within the disk, and must not be empty; the result has at least one run.

        Raises:
            HostError: The host cannot search the file for holes.
        """
        starts: list[int] = []
        kinds: list[int] = []
        at = start
        while at < end and len(starts) < _MAX_RAW_RUNS_PER_CALL:
            data = await self._file.next_data(at)
            if data is None or data > at:
                starts.append(at)
                kinds.append(HOLE)
                at = end if data is None else data
            else:
                starts.append(at)
                kinds.append(DATA)
                hole = await self._file.next_hole(at)
                at = end if hole is None else hole
        offsets = np.array(starts, np.int64)
        return Runs(offsets, np.array(kinds, np.uint8), offsets, min(at, end))


def _single(start: int, kind: int, end: int, offset: int = 0) -> Runs:
    """Return a single run of kind `UNALLOCATED` or `BAD`; only a `BAD` run has an ``offset``."""
    return Runs(np.array([start]), np.array([kind], np.uint8), np.array([offset]), end)


def _concatenate(adjacent: list[Runs]) -> Runs:
    """Return the runs of adjacent ranges as one `Runs`."""
    if len(adjacent) == 1:
        return adjacent[0]
    return Runs(
        np.concatenate([runs.starts for runs in adjacent]),
        np.concatenate([runs.kinds for runs in adjacent]),
        np.concatenate([runs.offsets for runs in adjacent]),
        adjacent[-1].end,
    )


def _entries(raw: bytes | bytearray) -> Array:
    """Return the table entries that ``raw`` stores; an incomplete last entry is ignored."""
    values: Array = np.frombuffer(raw, "<i8", len(raw) // ENTRY_BYTES)
    return values if sys.byteorder == "little" else values.astype(np.int64)
