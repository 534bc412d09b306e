"""How one file of a chain stores a range of the disk, as arrays: a full disk has millions of runs.

`Layer.lookup` answers requests, with an object for each extent.  Here the entries of
whole pieces of tables are judged and joined with numpy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.lookup.tablecache import L2
from qedfuse.ondisk.constants import ENTRY_BYTES, SECTOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer, QedLayer

    Array = NDArray[np.int64]

UNALLOCATED: Final = 0
"""Not in this layer."""
ZEROS: Final = 1
"""Zeros without a place in the file."""
DATA: Final = 2
"""Data at an offset of the file."""
HOLE: Final = 3
"""Zeros at an offset of the file, where it has a hole."""
BAD: Final = 4
"""An entry that points where it may not."""

_TABLE_READ_BYTES: Final = 1 << 18
"""Bytes of a table that are read at once."""
_MAX_TABLE_READS_PER_CALL: Final = 4
"""Pieces that are read before what was found is given out."""
_MAX_RAW_RUNS_PER_CALL: Final = 1 << 16
"""Runs of a raw file that are given out at once."""


@dataclass(slots=True)
class Runs:
    """Neighbouring runs: guest offset, kind and file offset of each; ``end`` is the last one's.

    The file offset means something where the kind is `DATA` or `HOLE`; of a `BAD` one it
    is what the entry says.
    """

    starts: Array
    kinds: NDArray[np.uint8]
    offsets: Array
    end: int


class QedRunReader:
    """The runs of a QED image."""

    def __init__(self, layer: QedLayer) -> None:
        """Read the tables of a layer that has been opened."""
        self._layer = layer
        self._geometry = layer.geometry
        self.size = layer.size
        self.name = layer.file.name

    async def read(self, start: int, end: int) -> Runs:
        """Give the runs from ``start`` on, at most up to ``end``."""
        geometry, layer = self._geometry, self._layer
        found: list[Runs] = []
        at = start
        for _ in range(_MAX_TABLE_READS_PER_CALL):
            if at >= end:
                break
            l1_index = geometry.l1_index(at)
            table, reason = await layer.table_at(l1_index)
            stop = min(end, (l1_index + 1) * geometry.table_span)
            if reason:
                runs = _single(at, BAD, stop)
            elif not table:
                following = layer.skip_missing_tables(l1_index)
                stop = min(end, max(stop, following * geometry.table_span))
                runs = _single(at, UNALLOCATED, stop)
            else:
                runs = await self._in_table(table, at, stop)
            found.append(runs)
            at = runs.end
        return _concatenate(found)

    async def _in_table(self, table: int, start: int, end: int) -> Runs:
        """Give the runs that a piece of one L2 table describes."""
        geometry = self._geometry
        index = geometry.l2_index(start)
        place = table + index * ENTRY_BYTES
        last = geometry.l2_index(end - 1) + 1
        data = await self._layer.file.next_data(place)
        table_end = table + last * ENTRY_BYTES
        if data is None or data >= table_end:
            return _single(start, UNALLOCATED, end)
        if data - place >= _TABLE_READ_BYTES:
            count = (data - place) // ENTRY_BYTES
            return _single(
                start, UNALLOCATED, geometry.floor(start) + count * geometry.cluster_size
            )
        raw = await self._layer.file.pread(place, min(_TABLE_READ_BYTES, table_end - place))
        values = _entries(raw)
        stop = min(end, geometry.floor(start) + len(values) * geometry.cluster_size)
        return self._runs(values, start, stop)

    def _runs(self, values: Array, start: int, end: int) -> Runs:
        """Join the entries that describe a range."""
        size = self._geometry.cluster_size
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
        offsets = values[first]
        within = start - int(starts[0])
        starts[0] = start
        kinds = kinds[first]
        if kinds[0] == DATA:
            offsets[0] += within
        return Runs(starts, kinds, offsets, end)


class RawRunReader:
    """The runs of a raw file: what the host stores, and its holes."""

    def __init__(self, layer: Layer) -> None:
        """Look at a file that has been opened."""
        self._file = layer.file
        # QEMU counts disks in sectors.
        self.size = -(-layer.size // SECTOR) * SECTOR
        self.name = layer.file.name

    async def read(self, start: int, end: int) -> Runs:
        """Give the runs from ``start`` on, at most up to ``end``."""
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
        places = np.array(starts, np.int64)
        return Runs(places, np.array(kinds, np.uint8), places, min(at, end))


def _single(start: int, kind: int, end: int) -> Runs:
    return Runs(np.array([start]), np.array([kind], np.uint8), np.zeros(1, np.int64), end)


def _concatenate(parts: list[Runs]) -> Runs:
    if len(parts) == 1:
        return parts[0]
    return Runs(
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.kinds for part in parts]),
        np.concatenate([part.offsets for part in parts]),
        parts[-1].end,
    )


def _entries(raw: bytes | bytearray) -> Array:
    values: Array = np.frombuffer(raw, "<i8", len(raw) // ENTRY_BYTES)
    return values if sys.byteorder == "little" else values.astype(np.int64)
