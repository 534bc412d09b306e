"""What shows through the holes of the top image, looked up once for the whole chain.

Backing files do not change while the disk is open.  So for each slice of the top image's
tables the layers below it can be laid over each other once; from then on a lookup costs
the same however long the chain is.  The result is an array with one code for each cluster
of the top image:

    MIXED                  not the same for the whole cluster: ask the layers one by one
    ZEROS                  no layer has it, or one has it as zeros
    offset | depth + 2     data of the layer at ``depth``; offsets in files are multiples of
                           4096, and no chain is that deep

These arrays share the memory of the tables, and are dropped and made again like those.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import L2, Slice
from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from qedfuse.util.singleflight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore

MIXED: Final = 0
ZEROS: Final = 1
_FIRST: Final = 2
_DEPTH_MASK: Final = 4095
_OPEN: Final = np.uint64((1 << 64) - 1)
"""While the layers are laid over each other: none has had this cluster so far."""

_MOST: Final = 1 << 20
"""Most clusters of a base that are looked at for one slice: a base can have much smaller
clusters than the top image."""


def place(code: int) -> tuple[int, int]:
    """Take a code for data apart: the depth, and the offset in that layer's file."""
    return (code & _DEPTH_MASK) - _FIRST, code & ~_DEPTH_MASK


class FlattenedBacking:
    """The layers below the top image, laid over each other slice by slice."""

    def __init__(self, layers: Sequence[Layer], top: QedLayer, store: SliceStore) -> None:
        """Look below ``top``, the first of ``layers``; results are kept in ``store``."""
        self._layers = layers
        self._store = store
        self._bits = top.geometry.cluster_bits
        self._entries = top.tables.slice_entries
        self._makes: SingleFlight[int] = SingleFlight()

    def cached(self, number: int) -> array[int] | None:
        """Return the codes for the top image's slice with this number, if in memory."""
        part = self._store.get((id(self), number))
        return None if part is None else part.entries

    async def codes(self, number: int) -> array[int]:
        """Return the codes for a slice of the top image, made anew if need be.

        Raises:
            HostError: A table of a backing file cannot be read.
        """
        found = self.cached(number)
        while found is None:
            await self._makes.run(number, lambda: self._make(number))
            found = self.cached(number)
        return found

    async def extents(self, start: int, end: int) -> list[Extent] | None:
        """Tell how a range shows through; None if the layers have to be asked one by one."""
        result = []
        while start < end:
            cluster = start >> self._bits
            codes = await self.codes(cluster // self._entries)
            index = cluster % self._entries
            code = codes[index]
            if code == MIXED:
                return None
            stop = min(end, (cluster + 1) << self._bits)
            if code == ZEROS:
                found = Extent(Kind.ZERO, start, stop - start, depth=len(self._layers) - 1)
            else:
                depth, offset = place(code)
                offset += start - (cluster << self._bits)
                found = Extent(Kind.DATA, start, stop - start, offset, depth)
            result.append(found)
            start = stop
        return result

    async def _make(self, number: int) -> None:
        """Lay the layers over each other for one slice."""
        size = 1 << self._bits
        starts = np.arange(self._entries, dtype=np.uint64) * np.uint64(size)
        starts += np.uint64(number * self._entries * size)
        codes = np.full(self._entries, _OPEN)
        for depth, layer in enumerate(self._layers[1:], 1):
            is_open = codes == _OPEN
            if not is_open.any():
                break
            found = await _of_layer(layer, starts, size, depth)
            # Past its end a layer reads as zeros.
            found[starts + np.uint64(size) > layer.size] = MIXED
            found[starts >= layer.size] = ZEROS
            codes = np.where(is_open, found, codes)
        codes[codes == _OPEN] = ZEROS
        entries = array("Q")
        entries.frombytes(codes.tobytes())
        self._store.put((id(self), number), Slice(number, L2, entries, None))


async def _of_layer(
    layer: Layer, starts: NDArray[np.uint64], size: int, depth: int
) -> NDArray[np.uint64]:
    """Tell what a layer has at clusters of ``size`` bytes: `_OPEN`, or a code."""
    if not isinstance(layer, QedLayer):
        return starts | np.uint64(depth + _FIRST)
    found = await _of_image(layer, starts, size)
    data = _is_place(found)
    # What the end of the file cuts short is for others to report.
    whole = found + np.uint64(size) <= layer.file.size()
    codes = np.where(whole, found | np.uint64(depth + _FIRST), np.uint64(MIXED))
    return np.where(data, codes, found)


async def _of_image(layer: QedLayer, starts: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """Tell what an image has at clusters of ``size`` bytes: `_OPEN`, a code, or a file offset."""
    own = layer.geometry.cluster_size
    first = int(starts[0]) // own
    last = (int(starts[-1]) + size - 1) // own
    if last - first >= _MOST:
        return np.full(len(starts), np.uint64(MIXED))
    values = await _entries(layer, first, last - first + 1)
    if own >= size:
        places = starts // np.uint64(own) - np.uint64(first)
        found: NDArray[np.uint64] = values[places]
        inside = starts % np.uint64(own)
        found[_is_place(found)] += inside[_is_place(found)]
        return found
    values = values.reshape(len(starts), size // own)
    lead = values[:, :1]
    steps = np.arange(values.shape[1], dtype=np.uint64) * np.uint64(own)
    even = (values == lead).all(axis=1) & ((lead[:, 0] == ZERO) | (lead[:, 0] == _OPEN))
    row = _is_place(lead[:, 0]) & (values == lead + steps).all(axis=1)
    codes: NDArray[np.uint64] = np.where(even | row, lead[:, 0], np.uint64(MIXED))
    return codes


def _is_place(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which values are offsets in a file."""
    places: NDArray[np.bool_] = (values > ZERO) & (values != _OPEN)
    return places


async def _entries(layer: QedLayer, first: int, count: int) -> NDArray[np.uint64]:
    """Collect the L2 entries of an image for clusters of its disk; the bad ones are `MIXED`."""
    found = np.full(count, _OPEN)
    geometry, step = layer.geometry, layer.tables.slice_entries
    end = min(first + count, geometry.clusters(layer.size))
    at = first
    while at < end:
        stop = min(end, at - at % step + step)
        l1_index = at // geometry.entries
        table, reason = await layer.table_at(l1_index)
        if reason:
            found[at - first : stop - first] = MIXED
        elif table:
            index = at % geometry.entries
            part = await layer.tables.load(table, index, L2)
            inside = index % step
            values = np.array(part.entries[inside : inside + stop - at], np.uint64)
            values[values == UNALLOCATED] = _OPEN
            if part.bad is not None:
                bad = np.frombuffer(part.bad, np.uint8)[inside : inside + stop - at]
                values[bad != 0] = MIXED
            found[at - first : stop - first] = values
        at = stop
    return found
