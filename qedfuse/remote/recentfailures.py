"""Which units could not be read a moment ago, so that a reader does not wait for them twice.

After a read-ahead that has failed, the kernel asks for the page itself, and a file system on a loop
device asks once more.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Final

_RECENT_SECONDS: Final = 1.0
"""For how long a failure is remembered."""


class RecentFailures:
    """The units of a file for which a reader has waited in vain within the last second.

    Threads may use the object concurrently.
    """

    def __init__(self) -> None:
        """Know of no failure."""
        self._lock = threading.Lock()
        self._times: dict[int, float] = {}  # when each unit failed last, in this order

    def record(self, first: int, last: int) -> None:
        """Record that a reader could not read some adjacent units; forget older failures."""
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
        """Return whether the failure of one of some adjacent units is remembered."""
        with self._lock:
            if not self._times:
                return False
            begin = time.monotonic() - _RECENT_SECONDS
            return any(self._times.get(unit, -math.inf) >= begin for unit in range(first, last + 1))
