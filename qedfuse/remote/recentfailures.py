"""The units that could not be fetched within the last second.

After a failed read-ahead, the kernel sends another read for the page itself, and a file system on a
loop device sends one more.  These reads must not each wait for the whole time limit.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Final

_RECENT_SECONDS: Final = 1.0
"""For how many seconds a failure is remembered."""


class RecentFailures:
    """The units of a file for which a reader has waited without success within the last second.

    Threads may use the object concurrently.
    """

    def __init__(self) -> None:
        """Begin without failures."""
        self._lock = threading.Lock()
        self._times: dict[
            int, float
        ] = {}  # time of the last failure of each unit, the oldest first

    def record(self, first: int, last: int) -> None:
        """Record that the units ``first`` to ``last`` could not be fetched; drop old failures."""
        now = time.monotonic()
        with self._lock:
            for unit in range(first, last + 1):
                self._times.pop(unit, None)
                self._times[unit] = now
            while (oldest := next(iter(self._times))) not in range(first, last + 1):
                if now - self._times[oldest] <= _RECENT_SECONDS:
                    break
                del self._times[oldest]

    def has_any(self, first: int, last: int) -> bool:
        """Return whether a failure of one of the units ``first`` to ``last`` is remembered."""
        with self._lock:
            if not self._times:
                return False
            begin = time.monotonic() - _RECENT_SECONDS
            return any(self._times.get(unit, -math.inf) >= begin for unit in range(first, last + 1))
