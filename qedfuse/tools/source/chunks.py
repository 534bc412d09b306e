"""Cutting a disk into the chunks that a copy or a comparison reads, and reading a chunk.

A copy reads one disk, or two if the target has a base; a comparison reads two.  The extents of a
disk (`Source.extents`) show how it stores each range.  A range need not be read if all these disks
have zeros there, or if both disks store the range as the same bytes of the same file.  A short
range of this kind is read nevertheless if it lies between ranges that must be read, because a
second chunk would cost more.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.foreignopening import content_identity
from qedfuse.tools.source.sourcebytes import read_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qedfuse.tools.common.blocks import Bytes
    from qedfuse.tools.source.extentbatches import ExtentBatch
    from qedfuse.tools.source.source import BlockingReader, Source

MAX_CHUNK_BYTES: Final = 4 << 20
"""Maximum length in bytes of a chunk of a copy, unless a block of the target is longer."""

_MAX_BRIDGED_GAP_BYTES: Final = 1 << 18
"""Maximum length of a gap in a chunk.  A gap lies between two ranges that must be read, after they
were widened to whole blocks, and is read with them although it need not be."""


class Segment(NamedTuple):
    """A part of a chunk that is stored as adjacent bytes of a file.

    Attributes:
        file: The file.
        offset: File offset in bytes.
        at: Distance in bytes from the beginning of the chunk to the beginning of the segment.
        length: Number of bytes.
    """

    file: BlockingReader
    offset: int
    at: int
    length: int


class Chunk(NamedTuple):
    """A range of the disk to read: whole blocks, except at the end of the disk.

    Attributes:
        start: Guest offset in bytes.
        length: Length in bytes.
        segments: The data of the chunk, in ascending order; the rest is zeros.
        base_segments: The same for the second disk, in the same range; empty if only one disk is
            read.
    """

    start: int
    length: int
    segments: tuple[Segment, ...]
    base_segments: tuple[Segment, ...] = ()


class Chunker:
    """Cuts extent batches of a disk into chunks."""

    def __init__(
        self,
        source: Source,
        block_size: int,
        max_chunk_bytes: int,
        *,
        base: Source | None = None,
        include_all: bool = False,
    ) -> None:
        """Prepare to cut batches of ``source``; the files of all disks must stay open.

        Args:
            source: The disk.
            block_size: Bytes in a block.  Each chunk begins at a multiple of this size, and
                ends at a multiple of this size or at the end of the disk.
            max_chunk_bytes: A multiple of ``block_size``; no chunk crosses a multiple of this.
            base: The second disk; None if only ``source`` is read.
            include_all: Whether the chunks also cover the ranges that need not be read.
        """
        self._block_size = block_size
        self._max_chunk_bytes = max_chunk_bytes
        self._include_all = include_all
        self._has_base = base is not None
        # Each list has one item for each layer, from the top image down.
        self._files = source.layer_files()
        self._base_files = base.layer_files() if base else []
        self._identities = [content_identity(file) for file in self._files]
        self._base_identities = [content_identity(file) for file in self._base_files]

    def chunks(self, batch: ExtentBatch) -> Iterator[Chunk]:
        """Yield the chunks of a batch in order."""
        data = [extent for extent in batch.extents if extent.kind is Kind.DATA]
        base_data = [extent for extent in batch.base_extents if extent.kind is Kind.DATA]
        if self._include_all:
            ranges = [(batch.start, batch.end)]
        elif self._has_base:
            ranges = self._unshared(data, base_data)
        else:
            ranges = [(extent.start, extent.end) for extent in data]
        cursor = _SegmentCursor(data, self._files)
        base_cursor = _SegmentCursor(base_data, self._base_files)
        for first, last in _aligned(ranges, self._block_size, batch.start, batch.end):
            at = first
            while at < last:
                stop = min(last, at - at % self._max_chunk_bytes + self._max_chunk_bytes)
                segments, base_segments = cursor.within(at, stop), base_cursor.within(at, stop)
                yield Chunk(at, stop - at, segments, base_segments)
                at = stop

    def _unshared(self, data: list[Extent], base_data: list[Extent]) -> list[tuple[int, int]]:
        """Return the ranges in which at least one disk has data, except shared ones (`_is_shared`).

        The arguments are the data extents of the two disks, ascending.
        """
        edges = sorted(
            {edge for extent in (*data, *base_data) for edge in (extent.start, extent.end)}
        )
        result = []
        extents, base_extents = iter(data), iter(base_data)
        upper, lower = next(extents, None), next(base_extents, None)
        for start, end in pairwise(edges):
            while upper is not None and upper.end <= start:
                upper = next(extents, None)
            while lower is not None and lower.end <= start:
                lower = next(base_extents, None)
            one = upper if upper is not None and upper.start <= start else None
            other = lower if lower is not None and lower.start <= start else None
            if one is None and other is None:
                continue
            if one is not None and other is not None and self._is_shared(one, other):
                continue
            result.append((start, end))
        return result

    def _is_shared(self, upper: Extent, lower: Extent) -> bool:
        """Return whether two extents are the same bytes of the same file where they overlap."""
        return (
            self._identities[upper.depth] == self._base_identities[lower.depth]
            and upper.file_offset - upper.start == lower.file_offset - lower.start
        )


def _aligned(
    ranges: Iterable[tuple[int, int]], block_size: int, start: int, end: int
) -> Iterable[tuple[int, int]]:
    """Yield the ranges, widened to whole blocks, and joined if the gap between them is short.

    The ranges are ascending, without overlaps, between ``start`` and ``end`` of the batch.
    """
    first = last = start
    for left, right in ranges:
        begin, stop = left - left % block_size, min(right + -right % block_size, end)
        if begin > last + (_MAX_BRIDGED_GAP_BYTES if last > first else 0):
            if last > first:
                yield first, last
            first = begin
        last = max(last, stop)
    if last > first:
        yield first, last


class _SegmentCursor:
    """Finds the segments of ascending ranges."""

    def __init__(self, extents: list[Extent], files: Sequence[BlockingReader]) -> None:
        """Begin at the first data extent; ``extents`` ascend, and ``files`` are sorted by depth."""
        self._extents = extents
        self._files = files
        self._next = 0

    def within(self, start: int, end: int) -> tuple[Segment, ...]:
        """Return the segments in a range; each call's range must lie past the one before."""
        result = []
        while self._next < len(self._extents):
            extent = self._extents[self._next]
            first, last = max(extent.start, start), min(extent.end, end)
            if first < last:
                offset = extent.file_offset + first - extent.start
                file = self._files[extent.depth]
                result.append(Segment(file, offset, first - start, last - first))
            if extent.end > end:
                break
            self._next += 1
        return tuple(result)


def read_segments(buffer: Bytes, segments: Sequence[Segment]) -> None:
    """Fill a buffer with the segments of a chunk, and with zeros elsewhere; blocks the thread.

    Args:
        buffer: As long as the chunk.
        segments: The segments of the chunk in ascending order.

    Raises:
        HostError: A system call failed, or a file ends before the end of a segment.
    """
    view = buffer.data
    at = 0
    for segment in segments:
        if segment.at > at:
            buffer[at : segment.at] = 0
        at = segment.at + segment.length
        read_whole(segment.file, segment.offset, view[segment.at : at])
    buffer[at:] = 0
