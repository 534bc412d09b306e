"""Whether two disks have the same content, whatever they are stored in."""

from __future__ import annotations

import threading
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from qedfuse.disk.lookup.extents import Kind
from qedfuse.tools.common.blocks import same_units
from qedfuse.tools.common.workerpool import WorkerPool
from qedfuse.tools.source.chunks import Chunker, fill
from qedfuse.tools.source.extentbatches import steps
from qedfuse.util.periodicprogress import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.common.workerpool import Ticket
    from qedfuse.tools.source.chunks import Piece
    from qedfuse.tools.source.source import Source

    Progress = Callable[[int, int], None]

_PIECE: Final = 1 << 20
"""Bytes that are compared at once; two of them fit into a processor's cache."""

_UNIT: Final = 4096
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
    cutter = Chunker(longer, _UNIT, _PIECE, base=shorter)
    report = (lambda: progress(search.done, longer.size)) if progress else None
    async with periodic_progress(report), aclosing(steps(longer, _UNIT, shorter)) as work:
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

    def until(self, limit: int | None, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Give pieces in order up to the first difference, or to those after a limit."""
        for piece in pieces:
            if self.found is not None or (limit is not None and piece.start > limit):
                return
            self.done = piece.start
            yield piece

    def hand(self) -> Callable[[Piece, Ticket], None]:
        """Give a function that compares one piece after the other, in a worker thread."""
        buffers = np.empty(_PIECE, np.uint8), np.empty(_PIECE, np.uint8)

        def look(piece: Piece, _turn: Ticket) -> None:
            one, other = (buffer[: piece.length] for buffer in buffers)
            fill(one, piece.parts, self._names[0])
            fill(other, piece.base, self._names[1])
            same = same_units(one, other, _UNIT)
            if same.all():
                return
            at = int(same.argmin()) * _UNIT
            unlike = one[at : at + _UNIT] != other[at : at + _UNIT]
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
