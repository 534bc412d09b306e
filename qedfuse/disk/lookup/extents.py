"""Extents: ranges of the disk, each stored in the same way from its start to its end."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Kind(enum.Enum):
    """How a range of the disk is stored."""

    DATA = "data"
    """Stored at ``file_offset`` in the file of the layer ``depth``; see `Extent`."""
    ZERO = "zero"
    """Reads as zeros, even where a base has data."""
    UNALLOCATED = "unallocated"
    """Not stored in this image: reads as the base, or as zeros if the image has no base."""
    BAD = "bad"
    """The table entry is invalid, or the file ends before the data ends; see ``reason``."""


class Extent(NamedTuple):
    """A range of the disk that is stored in the same way from its start to its end.

    Attributes:
        kind: How the range is stored.
        start: Guest offset of the first byte.
        length: Length in bytes.
        file_offset: File offset of the data; 0 if ``kind`` is not `Kind.DATA`.
        depth: Depth of the layer that stores the range: 0 for the image itself, 1 for its base and
            so on.  Zeros that no layer stores have the depth of the last base.  If a base above it
            ends before them, they have the depth of this base, except in `FlattenedBacking`.
        reason: For a bad extent a message about what is wrong; empty for the other kinds.
    """

    kind: Kind
    start: int
    length: int
    file_offset: int = 0
    depth: int = 0
    reason: str = ""

    @property
    def end(self) -> int:
        """The guest offset just past the extent."""
        return self.start + self.length

    def continued_by(self, other: Extent) -> bool:
        """Return whether ``other`` follows this extent on the disk and is stored in the same way.

        Data must also follow in the file.
        """
        return (
            self.kind is other.kind
            and self.end == other.start
            and self.depth == other.depth
            and self.reason == other.reason
            and (self.kind is not Kind.DATA or self.file_offset + self.length == other.file_offset)
        )


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Return ``extents``, which must be in order, with neighbours joined where possible."""
    result: list[Extent] = []
    for extent in extents:
        if result and result[-1].continued_by(extent):
            result[-1] = result[-1]._replace(length=result[-1].length + extent.length)
        else:
            result.append(extent)
    return result
