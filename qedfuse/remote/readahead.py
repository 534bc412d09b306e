"""How far to fetch ahead: not at all for random reads, further with each sequential one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_MIN_WINDOW_UNITS: Final = 1
_MAX_STREAMS: Final = 8
"""Maximum number of sequential readers that are distinguished."""


class ReadAhead:
    """Recognises sequential readers by the units that they read.

    A read is sequential if it begins in the unit where another has ended, in the next one, or
    among the units that were fetched ahead of that reader.  Most reads of units that are ready are
    not recorded here, because the mount answers them from the page cache.
    """

    def __init__(self) -> None:
        """Know of no reader."""
        self._streams: OrderedDict[int, int] = OrderedDict()  # last unit of a reader to its window

    def window(self, first: int, last: int, max_units: int) -> int:
        """Record a read of some adjacent units; return how many units to have fetched after them.

        The window of a sequential reader doubles with each unit, up to ``max_units``.
        """
        before = self._reader_before(first)
        window = 0
        if before is not None:
            window = self._streams.pop(before)
            if before < last:
                window = max(2 * window, _MIN_WINDOW_UNITS)
        window = min(window, max_units)
        self._streams[last] = window
        if len(self._streams) > _MAX_STREAMS:
            self._streams.popitem(last=False)
        return window

    def _reader_before(self, first: int) -> int | None:
        """Return the last unit of the reader that a read continues; None if it begins anew."""
        return max(
            (last for last, window in self._streams.items() if last <= first <= last + window + 1),
            default=None,
        )
