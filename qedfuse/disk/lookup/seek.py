"""Seeking data and holes through the whole chain, for lseek(2) with SEEK_DATA and SEEK_HOLE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.layer import QedLayer, RawLayer
from qedfuse.disk.lookup.slices import L1, L2
from qedfuse.ondisk.constants import UNALLOCATED, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.slices import Slice

_FIRST_LOOKUP_BYTES: Final = 1 << 20
"""Maximum length of the first lookup of a search; doubled for each further lookup.

The result is mostly near the start of the search, and a short lookup returns few extents.
"""


async def next_data(chain: Chain, start: int) -> int | None:
    """Return the guest offset of the first data at or past ``start``; None if there is none.

    Bad extents count as data, so that a program that copies the disk gets the read error.

    Raises:
        HostError: The host cannot read a file.
    """
    return await _find(chain, start, data=True)


async def next_hole(chain: Chain, start: int) -> int:
    """Return the guest offset of the first hole at or past ``start``, at most the disk's size.

    A hole is a range of zeros that is not stored as data.

    Raises:
        HostError: The host cannot read a file.
    """
    found = await _find(chain, start, data=False)
    return chain.layers[0].size if found is None else found


async def _find(chain: Chain, start: int, *, data: bool) -> int | None:
    """Find the first data (with ``data``) or hole at or past ``start``; None if there is none."""
    size, step = chain.layers[0].size, _FIRST_LOOKUP_BYTES
    while start < size:
        # Data of the image itself contains no hole, so a search for a hole skips this data.
        end = start if data else await _past_data(chain, start)
        if end == start:
            # No layer is looked up past the end of its slice of L2 entries.  So even if all
            # clusters are scattered, the lookup returns thousands of extents and not millions.
            end = min(start + step, await _lookup_end(chain, start))
            step *= 2
            for extent in await chain.extents(start, end - start):
                found = await _within(chain, extent, data=data)
                if found is not None:
                    return found
        start = end
        await trio.lowlevel.checkpoint()
    return None


async def _lookup_end(chain: Chain, start: int) -> int:
    """Return how far a lookup from ``start`` may reach: the lowest `_slice_end` of all layers."""
    end = chain.layers[0].size
    for layer in chain.layers:
        if isinstance(layer, QedLayer) and start < layer.size:
            end = min(end, await _slice_end(layer, start))
    return end


async def _slice_end(layer: QedLayer, start: int) -> int:
    """Return the guest offset where the slice of L2 entries for ``start`` ends.

    If the L1 entry for ``start`` is 0 or bad, the rest of its slice of L1 entries is searched for
    an entry that is not 0.  The result is the first guest offset of that entry, or, if there is
    none, the guest offset at which the slice of L1 entries ends.
    """
    geometry = layer.geometry
    l1_index = geometry.l1_index(start)
    table_offset, _reason = await layer.table_at(l1_index)
    if table_offset:
        step = layer.tables.slice_entries << geometry.cluster_bits
        return start - start % step + step
    slice_ = await layer.tables.load(layer.header.l1_table_offset, l1_index, L1)
    rest = _entries(slice_)[l1_index % layer.tables.slice_entries + 1 :]
    return (l1_index + 1 + _first_true(rest != UNALLOCATED)) * geometry.table_span


async def _past_data(chain: Chain, start: int) -> int:
    """Return the guest offset at which the image's own data at ``start`` ends.

    Only one slice of L2 entries is searched, so the next slice may continue the data.  Bad L2
    entries count as data.  Returns ``start`` if the image itself has no data there, or is raw.
    """
    top = chain.layers[0]
    if isinstance(top, QedLayer):
        geometry = top.geometry
        table_offset, _reason = await top.table_at(geometry.l1_index(start))
        if table_offset:
            index = geometry.l2_index(start)
            slice_ = await top.tables.load(table_offset, index, L2)
            count = _first_true(_entries(slice_)[index % top.tables.slice_entries :] <= ZERO)
            if count:
                return min(top.size, geometry.floor(start) + count * geometry.cluster_size)
    return start


def _entries(slice_: Slice) -> NDArray[np.uint64]:
    """Return the entries of a slice as an array, without a copy."""
    return np.frombuffer(slice_.entries, np.uint64)


def _first_true(which: NDArray[np.bool_]) -> int:
    """Return the index of the first true element; the length if there is none."""
    return int(which.argmax()) if which.any() else len(which)


async def _within(chain: Chain, extent: Extent, *, data: bool) -> int | None:
    """Return where an extent has its first data (with ``data``) or hole; None without one."""
    if extent.kind is not Kind.DATA:
        return extent.start if data == (extent.kind is Kind.BAD) else None
    layer = chain.layers[extent.depth]
    if not isinstance(layer, RawLayer):
        return extent.start if data else None
    # A lookup in a raw base returns data even for holes.
    find = layer.file.next_data if data else layer.file.next_hole
    found = await find(extent.file_offset)
    if found is None or found >= extent.file_offset + extent.length:
        return None
    return extent.start + found - extent.file_offset
