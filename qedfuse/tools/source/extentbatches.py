"""Walking through the extents of a disk in batches, optionally together with another disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.source.source import Source

_BATCH_BYTES: Final = 1 << 28
"""A batch is complete when it covers at least this many bytes of the disk."""

_BATCH_EXTENTS: Final = 1 << 14
"""A batch is also complete when it has at least this many extents and covers at least one block."""


class ExtentBatch(NamedTuple):
    """How a disk, and possibly another disk, stores a range.

    Attributes:
        start: Guest offset in bytes where the range begins.
        end: Guest offset in bytes where the range ends.
        extents: The extents of the disk in the range, in order and without gaps.
        base_extents: The extents of the other disk in the range, in order and without gaps.  They
            end where that disk ends, so there may be none.
    """

    start: int
    end: int
    extents: list[Extent]
    base_extents: list[Extent]


async def extent_batches(
    source: Source, block_size: int, base: Source | None = None
) -> AsyncGenerator[ExtentBatch, None]:
    """Yield batches that cover a whole disk; yield nothing if the disk has 0 bytes.

    Args:
        source: The disk.
        block_size: Bytes in a block.  Batches begin and end at multiples of this size, except at
            the end of the disk.
        base: Another disk, in which each range is looked up as well; None for no other disk.

    Raises:
        CorruptImageError: A table entry of one of the disks is bad.  All whole blocks before it
            have been yielded.
        HostError: The host cannot read a file.
    """
    at, size = 0, source.size
    while at < size:
        extents = await _read_batch(source, at, size, block_size)
        end = extents[-1].end
        base_extents: list[Extent] = []
        if base is not None and at < base.size:
            base_extents = await _read_batch(base, at, end, block_size)
            # The extents of the other disk may end before `end`, because the other disk ends, or
            # because they fill a batch.  In the second case, this batch must end there too.
            if base_extents[-1].end < base.size:
                end = min(end, base_extents[-1].end)
        bad = [extent for extent in (*extents, *base_extents) if extent.kind is Kind.BAD]
        first_bad = min(bad, key=lambda extent: extent.start, default=None)
        if first_bad is not None:
            end = min(end, first_bad.start)
        if end < size:
            end -= end % block_size
        if end > at:
            yield ExtentBatch(at, end, _before(end, extents), _before(end, base_extents))
        elif first_bad is not None:
            raise CorruptImageError(first_bad.reason)
        at = end


async def _read_batch(source: Source, start: int, end: int, block_size: int) -> list[Extent]:
    """Return the extents from ``start`` on, up to ``end`` or until they fill a batch."""
    found: list[Extent] = []
    at, end = start, min(end, source.size)
    while at < end:
        found += await source.extents(at, end - at)
        at = found[-1].end
        covered = at - start
        is_enough = covered >= _BATCH_BYTES or len(found) >= _BATCH_EXTENTS
        if is_enough and covered >= block_size:
            break
    return found


def _before(end: int, extents: list[Extent]) -> list[Extent]:
    """Return the extents before a guest offset; an extent that crosses the offset is shortened."""
    return [
        extent._replace(length=min(extent.end, end) - extent.start)
        for extent in extents
        if extent.start < end
    ]
