"""The work of a copy cut into pieces: where there may be data, and what in it is zeros."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from qedfuse.disk.extents import Extent, Kind
from qedfuse.errors import CorruptImageError, HostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence

    from numpy.typing import NDArray

    from qedfuse.tools.sources import Source

    Mask = NDArray[np.bool_]

PIECE: Final = 4 << 20
"""Bytes that are read at a time: beside them a hop to a worker thread costs little."""

_FIRST_STEP: Final = 1 << 28
_LEAST_STEP: Final = 1 << 24
_MOST_STEP: Final = 1 << 40
_FEW: Final = 1 << 10
_MANY: Final = 1 << 14
"""Bytes of the disk whose extents are asked for at a time, and the extents in an answer below
which it is doubled or above which it is halved."""

_CLOSE: Final = 1 << 18
"""Bytes; a hole that is not larger is looked at as if it were data, which costs less than a
piece of its own on each side."""

_SAMPLES: Final = 4
"""Words of a cluster that are looked at before all of it is."""


class Part(NamedTuple):
    """Bytes of a file that belong into a piece: at ``at``, counted from its beginning."""

    descriptor: int
    offset: int
    at: int
    length: int


class Piece(NamedTuple):
    """A range of the disk to copy, whole units but for the disk's end.

    Attributes:
        start: Guest offset.
        length: Bytes.
        parts: Where its data is; the rest is zeros.
        base: The same for the base that the target shows through, if it has one.
    """

    start: int
    length: int
    parts: tuple[Part, ...]
    base: tuple[Part, ...] = ()


async def steps(source: Source, unit: int) -> AsyncIterator[tuple[int, int, list[Extent]]]:
    """Go through a disk in steps, of whole units: from where, to where, and how it is stored.

    Raises:
        CorruptImageError: A table entry is bad.
        HostError: The host cannot read a file.
    """
    at, step, end = 0, _FIRST_STEP, source.size
    while at < end:
        length = min(step, end - at)
        found = await source.extents(at, length)
        for extent in found:
            if extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
        yield at, at + length, found
        at += length
        if len(found) < _FEW:
            step = min(step * 2, _MOST_STEP)
        elif len(found) > _MANY:
            step = max(step // 2, _LEAST_STEP, unit)


async def pieces(
    source: Source, unit: int, longest: int, *, base: Source | None = None, full: bool = False
) -> AsyncGenerator[Piece, None]:
    """Cut what has to be looked at into pieces, in order.

    Args:
        source: The disk to copy.
        unit: Bytes; pieces begin and end at multiples of it.
        longest: Bytes that a piece may have; pieces end at multiples of it, too.
        base: What the target shows of itself; where both have the same bytes of the same
            file there is nothing to do.
        full: Also what is known to be zeros.

    Raises:
        CorruptImageError: A table entry is bad.
        HostError: The host cannot read a file.
    """
    places = _Places(source, base)
    async for start, end, found in steps(source, unit):
        data = [extent for extent in found if extent.kind is Kind.DATA]
        under: list[Extent] = []
        if base is not None and start < base.size:
            under = [
                extent
                for extent in await base.extents(start, end - start)
                if extent.kind is Kind.DATA
            ]
        if full:
            ranges = [(start, end)]
        elif base is None:
            ranges = [(extent.start, extent.end) for extent in data]
        else:
            ranges = places.different(data, under)
        one, other = _Cursor(data, places.of_source), _Cursor(under, places.of_base)
        for first, last in _in_units(ranges, unit, start, end):
            at = first
            while at < last:
                stop = min(last, at - at % longest + longest)
                yield Piece(at, stop - at, one.parts(at, stop), other.parts(at, stop))
                at = stop


def _in_units(
    ranges: Iterable[tuple[int, int]], unit: int, start: int, end: int
) -> Iterable[tuple[int, int]]:
    """Widen ranges within a step to whole units, and join those that are close together."""
    first = last = start
    for left, right in ranges:
        begin, stop = left - left % unit, min(right + -right % unit, end)
        if begin > last + (_CLOSE if last > first else 0):
            if last > first:
                yield first, last
            first = begin
        last = max(last, stop)
    if last > first:
        yield first, last


class _Places:
    """Tells which files two disks are made of, and where they are the same."""

    def __init__(self, source: Source, base: Source | None) -> None:
        """Look at the files once; they stay open."""
        self._source = [(info.st_dev, info.st_ino) for info in source.files()]
        self._base = [(info.st_dev, info.st_ino) for info in base.files()] if base else []
        self.of_source = [source.descriptor(depth) for depth in range(len(self._source))]
        self.of_base = [base.descriptor(depth) for depth in range(len(self._base))] if base else []

    def different(self, data: list[Extent], under: list[Extent]) -> list[tuple[int, int]]:
        """Give the ranges in which either has data, and not both the same."""
        edges = sorted({edge for extent in (*data, *under) for edge in (extent.start, extent.end)})
        result = []
        one, other = iter(data), iter(under)
        mine, theirs = next(one, None), next(other, None)
        for start, end in pairwise(edges):
            while mine is not None and mine.end <= start:
                mine = next(one, None)
            while theirs is not None and theirs.end <= start:
                theirs = next(other, None)
            first = mine if mine is not None and mine.start <= start else None
            second = theirs if theirs is not None and theirs.start <= start else None
            if first is None and second is None:
                continue
            if first is not None and second is not None and self._same(first, second):
                continue
            result.append((start, end))
        return result

    def _same(self, mine: Extent, theirs: Extent) -> bool:
        """Tell whether two extents that overlap are the same bytes of one file."""
        return (
            self._source[mine.depth] == self._base[theirs.depth]
            and mine.file_offset - mine.start == theirs.file_offset - theirs.start
        )


class _Cursor:
    """Finds the parts of one piece after the other, all in order."""

    def __init__(self, extents: list[Extent], descriptors: list[int]) -> None:
        """Begin at the first extent of a step."""
        self._extents = extents
        self._descriptors = descriptors
        self._next = 0

    def parts(self, start: int, end: int) -> tuple[Part, ...]:
        """Give what lies within a range; later calls are about what comes later."""
        result = []
        while self._next < len(self._extents):
            extent = self._extents[self._next]
            first, last = max(extent.start, start), min(extent.end, end)
            if first < last:
                offset = extent.file_offset + first - extent.start
                descriptor = self._descriptors[extent.depth]
                result.append(Part(descriptor, offset, first - start, last - first))
            if extent.end > end:
                break
            self._next += 1
        return tuple(result)


def fill(buffer: NDArray[np.uint8], parts: Sequence[Part], name: str) -> None:
    """Read the parts of a piece into a buffer, zeros between them; for a worker thread.

    Raises:
        HostError: The host refused, or a file has become shorter.
    """
    view = buffer.data
    at = 0
    for part in parts:
        if part.at > at:
            buffer[at : part.at] = 0
        at = part.at + part.length
        _read(view[part.at : at], part, name)
    buffer[at:] = 0


def _read(view: memoryview, part: Part, name: str) -> None:
    """Read one part, however little the host gives at a time."""
    done = 0
    while done < part.length:
        try:
            count = os.preadv(part.descriptor, (view[done:],), part.offset + done)
        except OSError as error:
            raise HostError.from_os(error, name, "read") from error
        if not count:
            msg = f"{name}: data at {part.offset}: found {done} bytes, expected {part.length}"
            raise HostError(msg)
        done += count


def zero_units(buffer: NDArray[np.uint8], unit: int) -> Mask:
    """Mark the units of a buffer that hold only zeros; the last one may be cut short."""
    whole = len(buffer) // unit * unit
    rows = buffer[:whole].view(np.uint64).reshape(-1, unit // 8)
    # Most data shows itself in a few words.  What does not is compared in full.
    zero: Mask = np.logical_not(rows[:, :: unit // 8 // _SAMPLES].any(axis=1))
    for row in np.flatnonzero(zero):
        zero[row] = not rows[row].any()
    if whole < len(buffer):
        zero = np.append(zero, not buffer[whole:].any())
    return zero


def same_units(one: NDArray[np.uint8], other: NDArray[np.uint8], unit: int) -> Mask:
    """Mark the units in which two buffers are equal."""
    whole = len(one) // unit * unit
    first = one[:whole].view(np.uint64).reshape(-1, unit // 8)
    second = other[:whole].view(np.uint64).reshape(-1, unit // 8)
    same: Mask = (first == second).all(axis=1)
    if whole < len(one):
        same = np.append(same, np.array_equal(one[whole:], other[whole:]))
    return same


def runs(mask: Mask) -> list[tuple[int, int]]:
    """Give the ranges of indices, end excluded, in which a mask is true."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
