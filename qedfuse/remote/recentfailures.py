"""The units (the pieces in which a remote file is fetched) whose fetch has recently failed.

After a failed read-ahead, the kernel sends a second read, for the page that the program needs.  A
file system on a loop device sends a third.  The failed units are remembered, so that only the first
of these reads waits for the whole time limit of a fetch.
"""

from __future__ import annotations

import threading
import time
from typing import Final

_RECENT_SECONDS: Final = 1.0
"""For how many seconds a failure is remembered."""
_MAX_REPEATED_SECONDS: Final = 3.0
"""A unit that fails again and again is remembered for at most this time after its first failure.
Without this limit, a reader that repeats failed reads would never again wait for the whole time
limit."""


class RecentFailures:
    """The units of a file for which a reader has waited without success within the last second.

    Threads may use the object concurrently.
    """

    def __init__(self) -> None:
        """Begin without failures."""
        self._lock = threading.Lock()
        # For each unit the times of its first and last recent failure.  The unit that has failed
        # most recently comes last.
        self._times: dict[int, tuple[float, float]] = {}

    def record(self, first: int, last: int) -> None:
        """Record that the units ``first`` to ``last`` could not be fetched; drop old failures."""
        now = time.monotonic()
        with self._lock:
            for unit in range(first, last + 1):
                begin, latest = self._times.pop(unit, (now, now))
                self._times[unit] = (begin if now - latest <= _RECENT_SECONDS else now, now)
            while (oldest := next(iter(self._times))) not in range(first, last + 1):
                if now - self._times[oldest][1] <= _RECENT_SECONDS:
                    break
                del self._times[oldest]

    def has_any(self, first: int, last: int) -> bool:
        """Return whether a failure of one of the units ``first`` to ``last`` is remembered."""
        with self._lock:
            if not self._times:
                return False
            now = time.monotonic()
            found = [self._times[unit] for unit in range(first, last + 1) if unit in self._times]
            return any(
                now - latest <= _RECENT_SECONDS and now - begin <= _MAX_REPEATED_SECONDS
                for begin, latest in found
            )
