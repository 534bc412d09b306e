"""Giving free memory back to the system.

Buffers of a MiB come and go, many at a time, and the C library keeps what they took up,
some 30 MiB, until it is asked.  To have it keep less in the first place would cost nearly
half the speed of large writes, because each buffer's pages would be new ones.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS: Final = 4.0
"""Shortest time between two rounds, each of which takes some milliseconds.  Less than the
idle time after which a disk clears NEED_CHECK and flushes, so that comes last."""

_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


class HeapTrimmer:
    """To be called whenever there may be something to give back, such as after a flush."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin at once; ``clock`` tells seconds."""
        self._clock = clock
        self._due = 0.0

    def __call__(self) -> None:
        """Give it back, unless that was done a moment ago."""
        now = self._clock()
        # Only the GNU C library has it, and only that one needs it.
        if now >= self._due and _trim is not None:
            self._due = now + SECONDS
            _trim(0)
