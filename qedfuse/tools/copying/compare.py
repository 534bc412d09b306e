"""Whether two disks have the same content, whatever they are stored in."""

from __future__ import annotations

import threading
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import HostError
from qedfuse.tools.common.blocks import equal_blocks
from qedfuse.tools.common.workerpool import WorkerPool
from qedfuse.tools.source.chunks import Chunker, read_segments
from qedfuse.tools.source.extentbatches import extent_batches
from qedfuse.util.periodicprogress import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.common.workerpool import Ticket
    from qedfuse.tools.source.chunks import Chunk
    from qedfuse.tools.source.source import Source

    Progress = Callable[[int, int], None]

_COMPARE_CHUNK_BYTES: Final = 1 << 20
"""Bytes that are compared at once; two of them fit into a processor's cache."""

_BLOCK_BYTES: Final = 4096
"""Bytes; pieces begin and end at multiples of it."""

_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        identical: Whether the disks are the same, in the sense that was asked for.
        reason: What differs first: the content, or with ``strict`` the size or the way
            in which something is stored.
        offset: Where it does, in bytes of the disks; None for the size.
        sizes: Bytes of the two disks.
    """

    identical: bool
    reason: Literal["content", "size", "allocation"] | None
    offset: int | None
    sizes: tuple[int, int]


async def compare(
    first: Source, second: Source, *, strict: bool = False, progress: Progress | None = None
) -> Comparison:
    """Compare two disks.  What one of them has past the end of the other has to be zeros.

    Args:
        first: One disk.
        second: The other.
        strict: They must have the same size, and data in the same places.
        progress: Called with the bytes compared so far and in all.

    Raises:
        CorruptImageError: A table entry is bad.
        HostError: A file cannot be read.
    """
    sizes = first.size, second.size
    if strict and first.size != second.size:
        return Comparison(identical=False, reason="size", offset=None, sizes=sizes)
    # Whatever one has past the end of the other is in a step of the longer one.
    longer, shorter = (first, second) if first.size >= second.size else (second, first)
    search = _Search(longer, shorter)
    crew = WorkerPool([search.hand() for _ in range(_THREADS)])
    cutter = Chunker(longer, _BLOCK_BYTES, _COMPARE_CHUNK_BYTES, base=shorter)
    report = (lambda: progress(search.done, longer.size)) if progress else None
    async with (
        periodic_progress(report),
        aclosing(extent_batches(longer, _BLOCK_BYTES, shorter)) as work,
    ):
        async for step in work:
            apart = _stored_apart(step.extents, step.below) if strict else None
            await crew.work(search.until(apart, cutter.cut(step)))
            if search.found is not None and (apart is None or search.found < apart):
                return Comparison(
                    identical=False, reason="content", offset=search.found, sizes=sizes
                )
            if apart is not None:
                return Comparison(identical=False, reason="allocation", offset=apart, sizes=sizes)
            search.done = step.end
    return Comparison(identical=True, reason=None, offset=None, sizes=sizes)


async def verify_copy(source: Source, copy: Source, name: str) -> None:
    """Compare all of a disk with a copy that is at least as long.

    Raises:
        HostError: They differ; the message says where they do first.
        QedError: One of them cannot be read.
    """
    found = await compare(source, copy)
    # What the copy has past the disk's end was there before.
    if found.offset is not None and found.offset < source.size:
        msg = f"{name}: content at {found.offset}: found other bytes than in {source.name}"
        raise HostError(msg)


class _Search:
    """Looks for the first difference, in several threads.

    Attributes:
        found: Offset of the first difference so far, if there is any.
        done: Offset up to which the disks have been looked at.
    """

    def __init__(self, one: Source, other: Source) -> None:
        """Search two disks."""
        self._names = one.name, other.name
        self._finding = threading.Lock()
        self.found: int | None = None
        self.done = 0

    def until(self, limit: int | None, pieces: Iterator[Chunk]) -> Iterator[Chunk]:
        """Give pieces in order up to the first difference, or to those after a limit."""
        for piece in pieces:
            if self.found is not None or (limit is not None and piece.start > limit):
                return
            self.done = piece.start
            yield piece

    def hand(self) -> Callable[[Chunk, Ticket], None]:
        """Give a function that compares one piece after the other, in a worker thread."""
        buffers = np.empty(_COMPARE_CHUNK_BYTES, np.uint8), np.empty(_COMPARE_CHUNK_BYTES, np.uint8)

        def look(piece: Chunk, _turn: Ticket) -> None:
            one, other = (buffer[: piece.length] for buffer in buffers)
            read_segments(one, piece.parts, self._names[0])
            read_segments(other, piece.base, self._names[1])
            same = equal_blocks(one, other, _BLOCK_BYTES)
            if same.all():
                return
            at = int(same.argmin()) * _BLOCK_BYTES
            unlike = one[at : at + _BLOCK_BYTES] != other[at : at + _BLOCK_BYTES]
            offset = piece.start + at + int(unlike.argmax())
            with self._finding:
                # Pieces are begun in order, so none that is not yet begun comes before.
                self.found = offset if self.found is None else min(self.found, offset)

        return look


def _stored_apart(one: list[Extent], other: list[Extent]) -> int | None:
    """Find the first offset that is data in one list and zeros or nothing in the other.

    Zeros and nothing are the same here: what is nothing in an image is zeros in an overlay.
    """
    ends = {extent.end: None for extent in (*one, *other)}
    places = [iter(one), iter(other)]
    current = [next(place, None) for place in places]
    start = min((extent.start for extent in current if extent), default=0)
    for end in sorted(ends):
        here, there = current
        if _has_data(here) is not _has_data(there):
            return start
        start = end
        for side, extent in enumerate(current):
            if extent is not None and extent.end <= end:
                current[side] = next(places[side], None)
    return None


def _has_data(extent: Extent | None) -> bool:
    """Tell whether there is more than zeros without a place; None is past the end."""
    return extent is not None and extent.kind is Kind.DATA
