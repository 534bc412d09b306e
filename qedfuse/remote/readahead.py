"""How far to fetch ahead: not at all for random reads, further with each sequential one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_MIN_WINDOW_UNITS: Final = 1
_MAX_STREAMS: Final = 8
"""Maximum number of sequential readers that are distinguished."""
_MAX_GAP_UNITS: Final = 4
"""How far a sequential reader may seem to jump, forward or back: several reads of the kernel are in
flight, and arrive in any order."""


@dataclass(slots=True)
class _Stream:
    """What is known of a reader.

    Attributes:
        last: The unit in which its last read has ended.
        window: How many units are fetched ahead of it.
        marker: A unit that was fetched ahead and that the reader comes for; -1 for none.
        end: The last unit that was fetched ahead; -1 for none.
    """

    last: int
    window: int = 0
    marker: int = -1
    end: int = -1

    def is_continued_by(self, first: int, last: int) -> bool:
        """Return whether a read of some adjacent units is likely to be of this reader."""
        gap = min(self.window, _MAX_GAP_UNITS)
        is_near = self.last - gap <= first <= self.last + 1 + gap
        return is_near or first <= self.marker <= last or first == self.end + 1


class ReadAhead:
    """Recognises sequential readers by the units that they read.

    A read is sequential if it begins in the unit where another has ended or shortly after that.
    Most reads of units that are ready are not recorded here, because the mount answers them from
    the page cache.  So a read is sequential as well if it is for the marked unit of those that were
    fetched ahead, or if it begins after the last of them.
    """

    def __init__(self) -> None:
        """Know of no reader."""
        self._streams: list[_Stream] = []  # the last used one is last

    def record_read(self, first: int, last: int, max_units: int) -> int:
        """Record a read of some adjacent units; return how many units to have fetched after them.

        The window of a sequential reader doubles with each unit, up to ``max_units``.
        """
        found = [stream for stream in self._streams if stream.is_continued_by(first, last)]
        if found:
            stream = max(found, key=lambda stream: stream.last)
            self._streams.remove(stream)
            if stream.last < last:
                stream.window = max(2 * stream.window, _MIN_WINDOW_UNITS)
                stream.last = last
        else:
            stream = _Stream(last)
        stream.window = min(stream.window, max_units)
        self._streams.append(stream)
        if len(self._streams) > _MAX_STREAMS:
            del self._streams[0]
        return stream.window

    def set_marker(self, first: int, last: int) -> int:
        """Record that units are fetched ahead of the reader whose read was recorded last.

        Returns one of them, which must not become ready until a reader needs it.  So the reader is
        recorded while it has half a window left.
        """
        stream = self._streams[-1]
        stream.marker = max(first, last - stream.window // 2)
        stream.end = last
        return stream.marker
