"""What an NBD server has said of an export: which ranges read as zeros.

Only the last answer is kept, which is what a search from the beginning to the end needs.  So the
memory is limited, and an answer is never old.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from qedfuse.nbd.messages import STATE_ZERO

if TYPE_CHECKING:
    from collections.abc import Sequence


class Found(NamedTuple):
    """What is known of an offset.

    Attributes:
        is_zero: Whether the byte reads as zero, and all that follow up to ``end``.
        end: Where what is known ends.
    """

    is_zero: bool
    end: int


class ExtentMap:
    """The last answer to a question about the extents of an export."""

    def __init__(self, size: int) -> None:
        """Know nothing of an export of ``size`` bytes."""
        self._size = size
        self._starts: list[int] = []
        self._zero: list[bool] = []
        self._end = 0

    def find(self, offset: int) -> Found | None:
        """Return what is known of an offset; None for nothing."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset >= self._end:
            return None
        is_last = index + 1 == len(self._starts)
        return Found(self._zero[index], self._end if is_last else self._starts[index + 1])

    def take(self, offset: int, extents: Sequence[tuple[int, int]]) -> None:
        """Replace what is known by (length, flags) of extents that begin at ``offset``."""
        self._starts, self._zero = [], []
        for length, flags in extents:
            is_zero = bool(flags & STATE_ZERO)
            if not self._zero or self._zero[-1] is not is_zero:
                self._starts.append(offset)
                self._zero.append(is_zero)
            offset += length
        self._end = min(offset, self._size)

    def set_all_data(self) -> None:
        """Take all of the export for data."""
        self._starts, self._zero, self._end = [0], [False], self._size
