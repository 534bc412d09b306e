"""A disk gone through in steps: how each is stored, and how another disk stores the same range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.source.source import Source

_BATCH_BYTES: Final = 1 << 28
"""Bytes of the disk in a step, at least, unless it is stored in many pieces."""

_BATCH_EXTENTS: Final = 1 << 14
"""Extents that are enough for a step, however little of the disk they are."""


class ExtentBatch(NamedTuple):
    """A range of a disk.

    Attributes:
        start: Guest offset where it begins.
        end: Where it ends.
        extents: How it is stored, in order and all of it.
        below: How the other disk stores it, as far as it goes.
    """

    start: int
    end: int
    extents: list[Extent]
    below: list[Extent]


async def extent_batches(
    source: Source, block_size: int, other: Source | None = None
) -> AsyncGenerator[ExtentBatch, None]:
    """Go through all of a disk; what comes before a bad entry is still given.

    Args:
        source: The disk.
        block_size: Bytes; batches begin and end at multiples of it, but for the disk's end.
        other: Another disk that the ranges are looked up in.

    Raises:
        CorruptImageError: A table entry of either disk is bad.
        HostError: The host cannot read a file.
    """
    at, size = 0, source.size
    while at < size:
        extents = await _next(source, at, size, block_size)
        end = extents[-1].end
        below: list[Extent] = []
        if other is not None and at < other.size:
            below = await _next(other, at, end, block_size)
            if below[-1].end < other.size:
                end = min(end, below[-1].end)
        bad = [extent for extent in (*extents, *below) if extent.kind is Kind.BAD]
        worst = min(bad, key=lambda extent: extent.start, default=None)
        if worst is not None:
            end = min(end, worst.start)
        if end < size:
            end -= end % block_size
        if end > at:
            yield ExtentBatch(at, end, _before(end, extents), _before(end, below))
        elif worst is not None:
            raise CorruptImageError(worst.reason)
        at = end


async def _next(source: Source, start: int, end: int, block_size: int) -> list[Extent]:
    """Ask for enough extents for a step, at least of a whole unit or up to the disk's end."""
    found: list[Extent] = []
    at, end = start, min(end, source.size)
    while at < end:
        found += await source.extents(at, end - at)
        at = found[-1].end
        covered = at - start
        if covered - covered % block_size and (
            covered >= _BATCH_BYTES or len(found) >= _BATCH_EXTENTS
        ):
            break
    return found


def _before(end: int, extents: list[Extent]) -> list[Extent]:
    """Give what lies before an offset."""
    return [
        extent._replace(length=min(extent.end, end) - extent.start)
        for extent in extents
        if extent.start < end
    ]
