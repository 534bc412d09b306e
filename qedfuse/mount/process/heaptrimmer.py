"""Returning free heap memory to the system with malloc_trim(3).

The C library keeps the memory of freed buffers, some 30 MiB, until malloc_trim is called.  If it
kept less, large writes would lose nearly half their speed, because the kernel would have to supply
new pages for each buffer.  So the server calls malloc_trim rarely: only after a flush, and at most
every 4 seconds.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_INTERVAL_SECONDS: Final = 4.0
"""Minimum time between two calls of malloc_trim; each takes some milliseconds.  If the last flush
of a guest comes within this time, the flush that clears NEED_CHECK some seconds later trims the
heap."""

# None if the C library is not GNU's; others keep less memory.
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class HeapTrimmer:
    """Trims the heap at most once in `MIN_INTERVAL_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a trimmer whose first call trims; ``clock`` returns seconds, at least 0."""
        self._clock = clock
        self._next_trim_time = 0.0

    def __call__(self) -> None:
        """Trim the heap, unless it was trimmed less than `MIN_INTERVAL_SECONDS` ago."""
        now = self._clock()
        if now >= self._next_trim_time and _malloc_trim is not None:
            self._next_trim_time = now + MIN_INTERVAL_SECONDS
            _malloc_trim(0)
