"""Whether two disks have the same content, whatever they are stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from qedfuse.disk.extents import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from qedfuse.disk.extents import Extent
    from qedfuse.tools.sources import Source

    Progress = Callable[[int, int], None]
    Buffer = bytes | bytearray

_STEP: Final = 1 << 29
"""Bytes of a disk whose extents are asked for at once."""

_PIECE: Final = 1 << 21
"""Bytes that are read at once."""


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
    whole = max(sizes)
    for start in range(0, whole, _STEP):
        end = min(start + _STEP, whole)
        one, other = [await _extents(source, start, end) for source in (first, second)]
        apart = _stored_apart(one, other) if strict else None
        for begin, stop in _data([*one, *other]):
            if apart is not None and begin > apart:
                break
            if progress is not None:
                progress(begin, whole)
            here = [await _read(source, begin, stop) for source in (first, second)]
            if here[0] != here[1]:
                offset = begin + first_difference(*here)
                if apart is None or offset < apart:
                    return Comparison(identical=False, reason="content", offset=offset, sizes=sizes)
        if apart is not None:
            return Comparison(identical=False, reason="allocation", offset=apart, sizes=sizes)
    if progress is not None:
        progress(whole, whole)
    return Comparison(identical=True, reason=None, offset=None, sizes=sizes)


def first_difference(one: Buffer, other: Buffer) -> int:
    """Give the index of the first byte that differs between two buffers of one length."""
    unlike = np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8)
    return int(unlike.argmax())


async def _extents(source: Source, start: int, end: int) -> list[Extent]:
    """Tell how a range is stored, as far as the disk goes."""
    length = min(end, source.size) - start
    return await source.extents(start, length) if length > 0 else []


async def _read(source: Source, start: int, end: int) -> Buffer:
    """Read a range; past the disk's end there are zeros."""
    length = min(end, source.size) - start
    data = await source.read(start, length) if length > 0 else b""
    return data if len(data) == end - start else bytes(data).ljust(end - start, b"\0")


def _data(extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    """Give the ranges that any of the extents has data in, in order and in pieces."""
    at = 0
    for extent in sorted(extents, key=lambda extent: extent.start):
        if extent.kind in {Kind.DATA, Kind.BAD}:
            at = max(at, extent.start)
            while at < extent.end:
                stop = min(extent.end, at + _PIECE)
                yield at, stop
                at = stop


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
    return extent is not None and extent.kind in {Kind.DATA, Kind.BAD}
