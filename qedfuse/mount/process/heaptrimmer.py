"""Returning free heap memory to the system with malloc_trim(3).

Requests allocate and free buffers of 1 MiB, many at a time.  The C library keeps the freed
memory, some 30 MiB, until malloc_trim is called.  If a limit made the C library keep less, large
writes would lose nearly half their speed, because the kernel would have to supply new pages for
each buffer.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_INTERVAL_SECONDS: Final = 4.0
"""Shortest time between two calls of malloc_trim, each of which takes some milliseconds.  This
time is less than the idle time after which a disk clears NEED_CHECK and flushes, so that the
heap is trimmed after that last flush as well."""

# None with another C library than GNU's; other C libraries keep less memory.
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class HeapTrimmer:
    """Trims the heap at most once in `MIN_INTERVAL_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a trimmer whose first call trims; ``clock`` returns seconds."""
        self._clock = clock
        self._due = 0.0

    def __call__(self) -> None:
        """Trim the heap, unless less than `MIN_INTERVAL_SECONDS` have passed since the last time.

        The caller should call this when memory has become free, such as after a flush.
        """
        now = self._clock()
        if now >= self._due and _malloc_trim is not None:
            self._due = now + MIN_INTERVAL_SECONDS
            _malloc_trim(0)
