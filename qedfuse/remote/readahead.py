"""How far to fetch ahead: not at all for random reads, further with each sequential one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_MIN_WINDOW_UNITS: Final = 1
_MAX_STREAMS: Final = 8
"""Maximum number of sequential readers that are distinguished."""


class ReadAhead:
    """Recognises sequential readers by the units that they read.

    A read is sequential if it begins in the unit where another has ended, or in the next one.
    """

    def __init__(self) -> None:
        """Know of no reader."""
        self._streams: OrderedDict[int, int] = OrderedDict()  # last unit of a reader to its window

    def window(self, first: int, last: int, max_units: int) -> int:
        """Record a read of some adjacent units; return how many units to have fetched after them.

        The window of a sequential reader doubles with each unit, up to ``max_units``.
        """
        window = self._streams.pop(first, None)
        is_next = window is None or last > first
        if window is None:
            window = self._streams.pop(first - 1, None)
        is_sequential = window is not None
        window = window or 0
        if is_sequential and is_next:
            window = max(2 * window, _MIN_WINDOW_UNITS)
        window = min(window, max_units)
        self._streams[last] = window
        if len(self._streams) > _MAX_STREAMS:
            self._streams.popitem(last=False)
        return window
