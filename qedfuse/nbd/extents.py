"""The extents of an export, as an NBD server has reported them: which ranges read as zeros.

Only the last reply is kept.  A search from beginning to end never needs an earlier one again.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.nbd.messages import STATE_ZERO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.nbd.requests import BlockStatus

MIN_STEP_BYTES: Final = 1 << 20
"""A reply is a small step if it covers fewer bytes than this, and fewer than its request."""


class KnownExtent(NamedTuple):
    """The rest of an extent, from an offset on.

    Attributes:
        is_zero: Whether all bytes from the offset to ``end`` read as zeros; False if unknown.
        end: Offset of the end of the extent.
    """

    is_zero: bool
    end: int


class ExtentMap:
    """The extents in the last reply about an export."""

    def __init__(self, size: int) -> None:
        """Begin without extents; ``size`` is the size of the export in bytes."""
        self._size = size
        self._starts: list[int] = []
        self._zero: list[bool] = []
        self._end = 0

    def find(self, offset: int) -> KnownExtent | None:
        """Return the extent at ``offset``; None if the last reply does not cover ``offset``."""
        index = bisect_right(self._starts, offset) - 1
        if index < 0 or offset >= self._end:
            return None
        is_last = index + 1 == len(self._starts)
        return KnownExtent(self._zero[index], self._end if is_last else self._starts[index + 1])

    def replace(self, offset: int, extents: Sequence[tuple[int, int]]) -> None:
        """Replace the extents by those of a reply.

        ``extents`` has (length, flags) of each extent; the first extent begins at ``offset``.
        """
        self._starts, self._zero = [], []
        for length, flags in extents:
            is_zero = bool(flags & STATE_ZERO)
            if not self._zero or self._zero[-1] is not is_zero:
                self._starts.append(offset)
                self._zero.append(is_zero)
            offset += length
        self._end = min(offset, self._size)

    def set_all_data(self) -> None:
        """Replace the extents by one extent of data, which covers the whole export."""
        self._starts, self._zero, self._end = [0], [False], self._size


class SmallSteps:
    """Limits the time that a search spends on replies that cover few bytes each.

    Without a limit, a server that reports extents of one byte could prolong a search almost without
    end.  A request for a lower offset than the last one, or for offset 0, begins a new search.
    """

    def __init__(self, max_seconds: float) -> None:
        """Permit the small steps of one search to take ``max_seconds`` together."""
        self._max_seconds = max_seconds
        self._seconds = 0.0
        self._last_offset = 0

    def add_reply(self, request: BlockStatus, seconds: float) -> bool:
        """Add the time of a reply; return whether the small steps have taken longer than permitted.

        Args:
            request: The request, with the extents of its reply.
            seconds: How long the reply has taken.
        """
        if request.offset < self._last_offset or not request.offset:
            self._seconds = 0.0
        self._last_offset = request.offset
        step = sum(length for length, _ in request.extents)
        if step < min(MIN_STEP_BYTES, request.length):
            self._seconds += seconds
        return self._seconds > self._max_seconds
