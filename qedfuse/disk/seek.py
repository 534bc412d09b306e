"""Finding where data begins and where it ends, along the whole chain (lseek(2))."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.extents import Kind
from qedfuse.disk.layer import RawLayer

if TYPE_CHECKING:
    from qedfuse.disk.chain import Chain
    from qedfuse.disk.extents import Extent

_FIRST_STEP: Final = 1 << 26
_LONGEST_STEP: Final = 1 << 42
"""Bytes that are looked at before other tasks get a turn.  Most holes are short, and a
sparse disk of many terabytes has few tables to look at."""


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
        end = min(size, start + step)
        for extent in await chain.extents(start, end - start):
            found = await _within(chain, extent, data=data)
            if found is not None:
                return found
        start, step = end, min(2 * step, _LONGEST_STEP)
        await trio.lowlevel.checkpoint()
    return None


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
