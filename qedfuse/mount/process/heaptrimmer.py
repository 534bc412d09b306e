"""Returning free heap memory to the system with malloc_trim(3).

Buffers of 1 MiB are allocated and freed, many at a time.  The C library keeps the freed
memory, some 30 MiB, until malloc_trim is called.  A lower limit on what it keeps would cost
nearly half the speed of large writes, because the pages of each buffer would be new ones.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_INTERVAL_SECONDS: Final = 4.0
"""Shortest time between two calls of malloc_trim, each of which takes some milliseconds.  It
is less than the idle time after which a disk clears NEED_CHECK and flushes, so that the heap
is also trimmed after that last flush."""

# Only the GNU C library has the function, and only that one keeps so much memory.
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class HeapTrimmer:
    """Trims the heap at most once in `MIN_INTERVAL_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a trimmer whose first call trims; ``clock`` returns seconds."""
        self._clock = clock
        self._due = 0.0

    def __call__(self) -> None:
        """Trim the heap if it is due; call it when memory may be free, such as after a flush."""
        now = self._clock()
        if now >= self._due and _malloc_trim is not None:
            self._due = now + MIN_INTERVAL_SECONDS
            _malloc_trim(0)
