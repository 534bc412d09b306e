"""Finding where data begins and where it ends, along the whole chain (lseek(2))."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.layer import QedLayer, RawLayer
from qedfuse.disk.lookup.tablecache import L1, L2
from qedfuse.ondisk.constants import UNALLOCATED, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.tablecache import Slice

_FIRST_STEP: Final = 1 << 20
"""Bytes; what is looked for is near in most cases, and a look costs by the extent."""


async def next_data(chain: Chain, start: int) -> int | None:
    """Find where the first data at or past a guest offset begins; None if there is none.

    What cannot be read counts as data: whoever copies the disk has to hear of it.

    Raises:
        HostError: The host cannot read a file.
    """
    return await _find(chain, start, data=True)


async def next_hole(chain: Chain, start: int) -> int:
    """Find the first guest offset at or past ``start`` that only zeros follow for a while.

    The end of the disk counts as a hole.

    Raises:
        HostError: The host cannot read a file.
    """
    found = await _find(chain, start, data=False)
    return chain.layers[0].size if found is None else found


async def _find(chain: Chain, start: int, *, data: bool) -> int | None:
    """Find the first byte at or past ``start`` that is data, or that is not."""
    size, step = chain.layers[0].size, _FIRST_STEP
    while start < size:
        end = start if data else await _past_data(chain, start)
        if end == start:
            # Never past a piece of a table: even if all of it is scattered, one look
            # yields thousands of extents and not millions.
            end = min(start + step, await _look_ahead(chain, start))
            step *= 2
            for extent in await chain.extents(start, end - start):
                found = await _within(chain, extent, data=data)
                if found is not None:
                    return found
        start = end
        await trio.lowlevel.checkpoint()
    return None


async def _look_ahead(chain: Chain, start: int) -> int:
    """Find how far one look goes: to where a piece of a layer's tables ends."""
    end = chain.layers[0].size
    for layer in chain.layers:
        if isinstance(layer, QedLayer) and start < layer.size:
            end = min(end, await _piece_end(layer, start))
    return end


async def _piece_end(layer: QedLayer, start: int) -> int:
    """Find the end of a slice of a table, or of a range without tables."""
    geometry = layer.geometry
    l1_index = geometry.l1_index(start)
    table, _reason = await layer.table_at(l1_index)
    if table:
        step = layer.tables.slice_entries << geometry.cluster_bits
        return start - start % step + step
    part = await layer.tables.load(layer.header.l1_table_offset, l1_index, L1)
    rest = _entries(part)[l1_index % layer.tables.slice_entries + 1 :]
    return (l1_index + 1 + _first(rest != UNALLOCATED)) * geometry.table_span


async def _past_data(chain: Chain, start: int) -> int:
    """Skip what the image itself has as data, within one slice of a table."""
    top = chain.layers[0]
    if isinstance(top, QedLayer):
        geometry = top.geometry
        table, _reason = await top.table_at(geometry.l1_index(start))
        if table:
            index = geometry.l2_index(start)
            part = await top.tables.load(table, index, L2)
            count = _first(_entries(part)[index % top.tables.slice_entries :] <= ZERO)
            if count:
                return min(top.size, geometry.floor(start) + count * geometry.cluster_size)
    return start


def _entries(part: Slice) -> NDArray[np.uint64]:
    """Show the entries of a slice to numpy, without copying them."""
    return np.frombuffer(part.entries, np.uint64)


def _first(which: NDArray[np.bool_]) -> int:
    """Find the first that is true; their number if none is."""
    return int(which.argmax()) if which.any() else len(which)


async def _within(chain: Chain, extent: Extent, *, data: bool) -> int | None:
    """Find the first byte of an extent that is data, or that is not."""
    if extent.kind is not Kind.DATA:
        return extent.start if data == (extent.kind is Kind.BAD) else None
    layer = chain.layers[extent.depth]
    if not isinstance(layer, RawLayer):
        return extent.start if data else None
    # A raw base is one piece of data for us; the host knows its holes.
    find = layer.file.next_data if data else layer.file.next_hole
    found = await find(extent.file_offset)
    if found is None or found >= extent.file_offset + extent.length:
        return None
    return extent.start + found - extent.file_offset
