"""The backing chain flattened: for each cluster of the top image, which base holds its data.

Backing files do not change while the disk is open.  So all layers below the top image are merged
once for each slice (part) of the top image's L2 tables.  Lookups then take the same time however
long the chain is.  The result is an array with one code for each cluster of the slice:

    MIXED                  each read must look the cluster up layer by layer: it is not one run in
                           one layer, or is bad, or a base has too many entries for the slice
    ZEROS                  the cluster reads as zeros; there is no data to read
    offset | depth + 2     the cluster is data at a file offset of the layer at ``depth``;
                           file offsets are multiples of 4096; ``depth + 2`` is below 4096

The arrays are kept in the store of the table cache, and evicted like slices of tables.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.slices import L2, Slice
from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from qedfuse.util.singleflight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore

MIXED: Final = 0
ZEROS: Final = ZERO
"""Equal to the table entry of a zero cluster, so that such entries need no conversion."""
_DEPTH_BIAS: Final = 2
"""What is added to a depth in a code, so that no code for data equals `MIXED` or `ZEROS`."""
_DEPTH_MASK: Final = 4095
"""The bits of a code for data that hold the depth plus `_DEPTH_BIAS`."""
_UNDECIDED: Final = np.uint64((1 << 64) - 1)
"""Code during the merge: the cluster is unallocated in all layers so far."""

_MAX_ENTRIES_PER_SLICE: Final = 1 << 20
"""Maximum number of entries of a base that are read for one slice of the top image.

A base with smaller clusters can have more.  Such a base is not read: clusters up to its end get the
code `MIXED`.
"""


def data_location(code: int) -> tuple[int, int]:
    """Return what a code for data holds: the depth of a layer, and the offset in its file."""
    return (code & _DEPTH_MASK) - _DEPTH_BIAS, code & ~_DEPTH_MASK


class FlattenedBacking:
    """The layers below the top image, merged slice by slice.

    Attributes:
        store_key: First part of the codes' keys in the store; the second is the slice's number.
    """

    def __init__(self, layers: Sequence[Layer], top: QedLayer, store: SliceStore) -> None:
        """Prepare to merge the layers below ``top``; ``store`` keeps the codes.

        ``layers`` has all layers of the chain, and begins with ``top``.
        """
        self._layers = layers
        self._store = store
        self.store_key = id(self)
        self._bits = top.geometry.cluster_bits
        self._slice_entries = top.tables.slice_entries
        self._merges: SingleFlight[int] = SingleFlight()

    def cached(self, slice_number: int) -> array[int] | None:
        """Return the codes for a slice, by its number on the disk; None if they are not cached."""
        found = self._store.get((self.store_key, slice_number))
        return None if found is None else found.entries

    async def codes(self, slice_number: int) -> array[int]:
        """Return the codes for a slice of the top image; make them if they are not cached.

        Raises:
            HostError: A table of a backing file cannot be read.
        """
        found = self.cached(slice_number)
        while found is None:
            await self._merges.run(slice_number, lambda: self._merge(slice_number))
            found = self.cached(slice_number)
        return found

    async def extents(self, start: int, end: int) -> list[Extent] | None:
        """Return how the layers below the top image store a range; None if a cluster is `MIXED`.

        Clusters that none of these layers has allocated are of kind zero.

        Raises:
            HostError: A table of a backing file cannot be read.
        """
        result = []
        while start < end:
            cluster = start >> self._bits
            codes = await self.codes(cluster // self._slice_entries)
            index = cluster % self._slice_entries
            code = codes[index]
            if code == MIXED:
                return None
            stop = min(end, (cluster + 1) << self._bits)
            if code == ZEROS:
                found = Extent(Kind.ZERO, start, stop - start, depth=len(self._layers) - 1)
            else:
                depth, offset = data_location(code)
                offset += start - (cluster << self._bits)
                found = Extent(Kind.DATA, start, stop - start, offset, depth)
            result.append(found)
            start = stop
        return result

    async def _merge(self, slice_number: int) -> None:
        """Merge the layers for one slice of the top image, and put the codes into the store."""
        size = 1 << self._bits
        starts = np.arange(self._slice_entries, dtype=np.uint64) * np.uint64(size)
        starts += np.uint64(slice_number * self._slice_entries * size)
        codes = np.full(self._slice_entries, _UNDECIDED)
        for depth, layer in enumerate(self._layers[1:], 1):
            is_undecided = codes == _UNDECIDED
            if not is_undecided.any():
                break
            found = await _codes_of_layer(layer, starts, size, depth)
            # A layer reads as zeros past its end.  A cluster that contains the end is `MIXED`.
            found[starts + np.uint64(size) > layer.size] = MIXED
            found[starts >= layer.size] = ZEROS
            codes = np.where(is_undecided, found, codes)
        codes[codes == _UNDECIDED] = ZEROS
        entries = array("Q")
        entries.frombytes(codes.tobytes())
        # A slice of the store, with codes instead of entries.
        self._store.put((self.store_key, slice_number), Slice(slice_number, L2, entries, None))


async def _codes_of_layer(
    layer: Layer, starts: NDArray[np.uint64], size: int, depth: int
) -> NDArray[np.uint64]:
    """Return the codes of one layer for clusters of ``size`` bytes at guest offsets ``starts``.

    The code is `_UNDECIDED` where the layer has allocated nothing.  The caller must replace the
    code of each cluster that reaches past the end of the layer's disk.
    """
    if not isinstance(layer, QedLayer):
        return starts | np.uint64(depth + _DEPTH_BIAS)
    found = await _clusters_of_image(layer, starts, size)
    is_data = _is_offset(found)
    # A cluster that the end of the file cuts short is `MIXED`.  So reads look it up in the layer,
    # which reports the part past the end as bad.
    whole = found + np.uint64(size) <= layer.file.size()
    codes = np.where(whole, found | np.uint64(depth + _DEPTH_BIAS), np.uint64(MIXED))
    return np.where(is_data, codes, found)


async def _clusters_of_image(
    layer: QedLayer, starts: NDArray[np.uint64], size: int
) -> NDArray[np.uint64]:
    """Return how an image stores clusters of ``size`` bytes at guest offsets ``starts``.

    Each value is `_UNDECIDED` (unallocated), `MIXED`, `ZEROS`, or the offset of the data.
    """
    own_size = layer.geometry.cluster_size
    first = int(starts[0]) // own_size
    last = (int(starts[-1]) + size - 1) // own_size
    if last - first >= _MAX_ENTRIES_PER_SLICE:
        return np.full(len(starts), np.uint64(MIXED))
    values = await _read_entries(layer, first, last - first + 1)
    if own_size >= size:  # each cluster of the top image lies within one cluster of this image
        indices = starts // np.uint64(own_size) - np.uint64(first)
        found: NDArray[np.uint64] = values[indices]
        inside = starts % np.uint64(own_size)
        found[_is_offset(found)] += inside[_is_offset(found)]
        return found
    # Each cluster of the top image covers several clusters of this image, one row of ``values``.
    values = values.reshape(len(starts), size // own_size)
    lead = values[:, :1]
    steps = np.arange(values.shape[1], dtype=np.uint64) * np.uint64(own_size)
    uniform = (values == lead).all(axis=1) & ((lead[:, 0] == ZERO) | (lead[:, 0] == _UNDECIDED))
    contiguous = _is_offset(lead[:, 0]) & (values == lead + steps).all(axis=1)
    codes: NDArray[np.uint64] = np.where(uniform | contiguous, lead[:, 0], np.uint64(MIXED))
    return codes


def _is_offset(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each value whether it is a file offset, not a code for something else."""
    is_offset: NDArray[np.bool_] = (values > ZERO) & (values != _UNDECIDED)
    return is_offset


async def _read_entries(layer: QedLayer, first: int, count: int) -> NDArray[np.uint64]:
    """Return the L2 entries of ``count`` clusters of an image, from number ``first`` on.

    Bad entries are `MIXED`.  Unallocated clusters, and those past the end, are `_UNDECIDED`.
    """
    found = np.full(count, _UNDECIDED)
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
            slice_ = await layer.tables.load(table, index, L2)
            inside = index % step
            values = np.array(slice_.entries[inside : inside + stop - at], np.uint64)
            values[values == UNALLOCATED] = _UNDECIDED
            if slice_.bad is not None:
                bad = np.frombuffer(slice_.bad, np.uint8)[inside : inside + stop - at]
                values[bad != 0] = MIXED
            found[at - first : stop - first] = values
        at = stop
    return found
