"""A disk gone through in steps: how each is stored, and how another disk stores the same range."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.extents import Kind
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from qedfuse.disk.extents import Extent
    from qedfuse.tools.sources import Source

_FIRST_STEP: Final = 1 << 28
_LEAST_STEP: Final = 1 << 24
_MOST_STEP: Final = 1 << 40
_FEW: Final = 1 << 10
_MANY: Final = 1 << 14
"""Bytes of the disk whose extents are asked for at a time, and the extents in an answer below
which it is doubled or above which it is halved."""


class Step(NamedTuple):
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


async def steps(
    source: Source, unit: int, other: Source | None = None
) -> AsyncGenerator[Step, None]:
    """Go through all of a disk; what comes before a bad entry is still given.

    Args:
        source: The disk.
        unit: Bytes; steps begin and end at multiples of it, but for the disk's end.
        other: Another disk that the ranges are looked up in.

    Raises:
        CorruptImageError: A table entry of either disk is bad.
        HostError: The host cannot read a file.
    """
    at, length, size = 0, max(_FIRST_STEP, unit), source.size
    while at < size:
        end = min(at + length, size)
        extents = await source.extents(at, end - at)
        below: list[Extent] = []
        if other is not None and at < other.size:
            below = await other.extents(at, end - at)
        bad = [extent for extent in (*extents, *below) if extent.kind is Kind.BAD]
        if bad:
            worst = min(bad, key=lambda extent: extent.start)
            good = worst.start - worst.start % unit
            if good > at:
                yield Step(at, good, _before(good, extents), _before(good, below))
            raise CorruptImageError(worst.reason)
        yield Step(at, end, extents, below)
        at = end
        count = len(extents) + len(below)
        if count < _FEW:
            length = min(length * 2, _MOST_STEP)
        elif count > _MANY:
            length = max(length // 2, _LEAST_STEP, unit)


def _before(end: int, extents: list[Extent]) -> list[Extent]:
    """Give what lies before an offset."""
    return [
        extent._replace(length=min(extent.end, end) - extent.start)
        for extent in extents
        if extent.start < end
    ]
