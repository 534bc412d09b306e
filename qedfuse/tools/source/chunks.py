"""The work of a copy cut into pieces: where there may be data, and reading it."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qedfuse.tools.common.blocks import Bytes
    from qedfuse.tools.source.extentbatches import ExtentBatch
    from qedfuse.tools.source.source import Source

MAX_CHUNK_BYTES: Final = 4 << 20
"""Bytes that are read at a time: beside them what a piece costs itself is little."""

_MAX_BRIDGED_HOLE_BYTES: Final = 1 << 18
"""Bytes; a hole that is not larger is looked at as if it were data, which costs less than a
piece of its own on each side."""


class Segment(NamedTuple):
    """Bytes of a file that belong into a piece: at ``at``, counted from its beginning."""

    descriptor: int
    offset: int
    at: int
    length: int


class Chunk(NamedTuple):
    """A range of the disk to copy, whole units but for the disk's end.

    Attributes:
        start: Guest offset.
        length: Bytes.
        parts: Where its data is; the rest is zeros.
        base: The same for the disk that it is looked at beside, if there is one.
    """

    start: int
    length: int
    parts: tuple[Segment, ...]
    base: tuple[Segment, ...] = ()


class Chunker:
    """Cuts the steps of a disk into pieces."""

    def __init__(
        self,
        source: Source,
        block_size: int,
        max_chunk_bytes: int,
        *,
        base: Source | None = None,
        full: bool = False,
    ) -> None:
        """Look at the files once; they stay open.

        Args:
            source: The disk.
            block_size: Bytes; chunks begin and end at multiples of it.
            max_chunk_bytes: Bytes that a chunk may have; pieces end at multiples of it, too.
            base: Another disk; where both have the same bytes of the same file there is
                nothing to do.
            full: Also what is known to be zeros.
        """
        self._unit = block_size
        self._longest = max_chunk_bytes
        self._full = full
        self._beside = base is not None
        self._source = [(info.st_dev, info.st_ino) for info in source.files()]
        self._base = [(info.st_dev, info.st_ino) for info in base.files()] if base else []
        self._of_source = [source.descriptor(depth) for depth in range(len(self._source))]
        self._of_base = [base.descriptor(depth) for depth in range(len(self._base))] if base else []

    def cut(self, step: ExtentBatch) -> Iterator[Chunk]:
        """Give the pieces that have to be looked at, in order."""
        data = [extent for extent in step.extents if extent.kind is Kind.DATA]
        under = [extent for extent in step.below if extent.kind is Kind.DATA]
        if self._full:
            ranges = [(step.start, step.end)]
        elif self._beside:
            ranges = self._different(data, under)
        else:
            ranges = [(extent.start, extent.end) for extent in data]
        one, other = _Cursor(data, self._of_source), _Cursor(under, self._of_base)
        for first, last in _aligned(ranges, self._unit, step.start, step.end):
            at = first
            while at < last:
                stop = min(last, at - at % self._longest + self._longest)
                yield Chunk(at, stop - at, one.parts(at, stop), other.parts(at, stop))
                at = stop

    def _different(self, data: list[Extent], under: list[Extent]) -> list[tuple[int, int]]:
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


def _aligned(
    ranges: Iterable[tuple[int, int]], block_size: int, start: int, end: int
) -> Iterable[tuple[int, int]]:
    """Widen ranges within a step to whole units, and join those that are close together."""
    first = last = start
    for left, right in ranges:
        begin, stop = left - left % block_size, min(right + -right % block_size, end)
        if begin > last + (_MAX_BRIDGED_HOLE_BYTES if last > first else 0):
            if last > first:
                yield first, last
            first = begin
        last = max(last, stop)
    if last > first:
        yield first, last


class _Cursor:
    """Finds the parts of one piece after the other, all in order."""

    def __init__(self, extents: list[Extent], descriptors: list[int]) -> None:
        """Begin at the first extent of a step."""
        self._extents = extents
        self._descriptors = descriptors
        self._next = 0

    def parts(self, start: int, end: int) -> tuple[Segment, ...]:
        """Give what lies within a range; later calls are about what comes later."""
        result = []
        while self._next < len(self._extents):
            extent = self._extents[self._next]
            first, last = max(extent.start, start), min(extent.end, end)
            if first < last:
                offset = extent.file_offset + first - extent.start
                descriptor = self._descriptors[extent.depth]
                result.append(Segment(descriptor, offset, first - start, last - first))
            if extent.end > end:
                break
            self._next += 1
        return tuple(result)


def read_segments(buffer: Bytes, parts: Sequence[Segment], name: str) -> None:
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


def _read(view: memoryview, part: Segment, name: str) -> None:
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
