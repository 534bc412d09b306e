"""How many units (`UNIT_BYTES`) to fetch ahead: none for random reads, more for sequential ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MIN_WINDOW_UNITS: Final = 1
_MAX_SHORT_WINDOW_UNITS: Final = 32
"""Maximum window (`_Stream.window`) of a reader until it has read more units than this number."""
_MAX_STREAMS: Final = 8
"""Maximum number of sequential readers that are distinguished."""
_MAX_GAP_UNITS: Final = 4
"""Maximum distance between two sequential reads.  They need not be adjacent, because the kernel
sends several reads concurrently, which arrive in any order."""


@dataclass(slots=True)
class _Stream:
    """The state of a reader.

    Attributes:
        last: The highest unit that the reader has read.
        first: The unit at which its first read began.
        window: Number of units that are fetched ahead of the reader.
        marker: The unit whose read starts the next fetch ahead; -1 for none.
        end: The last unit that was fetched ahead; -1 for none.
    """

    last: int
    first: int
    window: int = 0
    marker: int = -1
    end: int = -1

    def is_continued_by(self, first: int, last: int) -> bool:
        """Return whether this reader has probably read the units ``first`` to ``last``."""
        gap = min(self.window, _MAX_GAP_UNITS)
        is_near = self.last - gap <= first <= self.last + 1 + gap
        is_after_end = self.end >= 0 and first == self.end + 1
        return is_near or first <= self.marker <= last or is_after_end


class ReadAhead:
    """Recognises sequential readers by the units that they read.

    A read is sequential if it begins near the unit where an earlier read has ended.  But most reads
    of a *ready* unit (`UnitStore.ready`) are not recorded, because the mount's extension answers
    them.  So a read is also sequential in two other cases: it needs the marker, which is one of the
    units that were fetched ahead; or it begins directly after these units.
    """

    def __init__(self) -> None:
        """Begin without readers."""
        self._streams: list[_Stream] = []  # the last used one is last

    def record_read(self, first: int, last: int, max_units: int) -> int:
        """Record a read of the units ``first`` to ``last``; return the window of its reader.

        The window is the number of units to fetch after ``last``: 0 for the first read of a reader.
        With the next read that ends in a later unit it becomes 1, and with each further one it
        doubles, up to ``max_units``.  Until the reader has read more than 32 units, the maximum is
        32.
        """
        found = [stream for stream in self._streams if stream.is_continued_by(first, last)]
        if found:
            stream = max(found, key=lambda stream: stream.last)
            self._streams.remove(stream)
            if stream.last < last:
                stream.window = max(2 * stream.window, _MIN_WINDOW_UNITS)
                stream.last = last
        else:
            stream = _Stream(last, first)
        is_short = stream.last - stream.first < _MAX_SHORT_WINDOW_UNITS
        max_window = min(max_units, _MAX_SHORT_WINDOW_UNITS) if is_short else max_units
        stream.window = min(stream.window, max_window)
        self._streams.append(stream)
        if len(self._streams) > _MAX_STREAMS:
            del self._streams[0]
        return stream.window

    def set_marker(self, first: int, last: int) -> int:
        """Record that the units ``first`` to ``last`` are fetched ahead of the latest reader.

        Returns the marker: a unit between ``first`` and ``last``.  The caller must not let the
        marker become ready until a reader needs it.  So the extension cannot answer the read that
        needs the marker, and this read is recorded.
        """
        stream = self._streams[-1]
        stream.marker = max(first, last - stream.window // 2)
        stream.end = last
        return stream.marker
