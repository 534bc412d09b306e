"""Returning free heap memory to the system with malloc_trim(3).

Requests allocate and free buffers of 1 MiB, many at a time.  The C library keeps the freed
memory, some 30 MiB, until malloc_trim is called.  The C library could be configured to keep less.
Then large writes would lose nearly half their speed, because the kernel would have to supply new
pages for each buffer.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MIN_INTERVAL_SECONDS: Final = 4.0
"""Minimum time between two calls of malloc_trim, each of which takes some milliseconds.  An idle
disk clears NEED_CHECK and flushes once more after a longer time, so the heap is trimmed after that
last flush as well."""

# None if the C library is not GNU's.  Other C libraries keep less memory.
_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class HeapTrimmer:
    """Trims the heap at most once in `MIN_INTERVAL_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Make a trimmer whose first call trims; ``clock`` returns seconds."""
        self._clock = clock
        self._due = 0.0

    def __call__(self) -> None:
        """Trim the heap, unless it was trimmed less than `MIN_INTERVAL_SECONDS` ago.

        Does nothing with a C library other than GNU's.
        The caller should call this when memory has become free, such as after a flush.
        """
        now = self._clock()
        if now >= self._due and _malloc_trim is not None:
            self._due = now + MIN_INTERVAL_SECONDS
            _malloc_trim(0)
