"""The central word: an extent, a range of the disk that is stored in one way."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Kind(enum.Enum):
    """How a range of the disk is stored."""

    DATA = "data"
    """In the file, at ``file_offset``."""
    ZERO = "zero"
    """As zeros, whatever a base says."""
    UNALLOCATED = "unallocated"
    """Not in this image: a base shows through, or zeros."""
    BAD = "bad"
    """By a table entry that points where it may not; ``reason`` says how."""


class Extent(NamedTuple):
    """A range of the disk; ``start``, ``length`` and ``file_offset`` in bytes.

    ``depth`` counts from 0, the image itself, down the chain of backing files.
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
        """Tell whether ``other`` and this extent are stored as one."""
        return (
            self.kind is other.kind
            and self.end == other.start
            and self.depth == other.depth
            and self.reason == other.reason
            and (self.kind is not Kind.DATA or self.file_offset + self.length == other.file_offset)
        )


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Join neighbours that are stored as one; the extents must be in order."""
    result: list[Extent] = []
    for extent in extents:
        if result and result[-1].continued_by(extent):
            result[-1] = result[-1]._replace(length=result[-1].length + extent.length)
        else:
            result.append(extent)
    return result
