"""Reservations of room in the cache, which is made in a thread while readers go on."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RETRY_BYTES: Final = 64 << 20
"""How many bytes are refused before room is looked for again."""
_MAX_WAIT_SECONDS: Final = 2.0
"""How long a reservation waits at most for room that is being made.  The removal of large entries
can take longer, and a reader waits until its unit is stored."""


class CacheSpace:
    """Counts what may still be stored in the cache.

    Threads may use the object concurrently.
    """

    def __init__(self, evict: Callable[[], int]) -> None:
        """Look for room at the first reservation.

        Args:
            evict: Makes room in the cache; returns how many bytes may be stored before it must
                be called again, 0 for none.  Called by one thread at a time.
        """
        self._evict = evict
        self._changed = threading.Condition()
        # All that follows is protected by the condition.
        self._free = 0  # bytes that may be reserved
        self._storing = 0  # bytes that are reserved, and perhaps not in the file yet
        self._taken = 0  # bytes that `evict`, which is running, may have overlooked
        self._refused = _RETRY_BYTES  # bytes since room was looked for
        self._is_evicting = False
        self._last_moment = 0.0  # until when reservations wait for `evict`

    @property
    def is_evicting(self) -> bool:
        """Whether room is being made, so that a reservation that fails may succeed soon."""
        return self._is_evicting

    @contextmanager
    def reserve(self, length: int) -> Iterator[str]:
        """Reserve room for some bytes, which are stored in the block.

        Yields:
            Why they must not be stored; empty if they may.
        """
        reason = self._take(length)
        try:
            yield reason
        finally:
            if not reason:
                with self._changed:
                    self._storing -= length

    def _take(self, length: int) -> str:
        """Reserve some bytes; return why that was not possible, or nothing."""
        with self._changed:
            if length > self._free and not self._is_evicting and self._refused >= _RETRY_BYTES:
                self._start_eviction()
            while length > self._free and self._is_evicting:
                seconds = self._last_moment - time.monotonic()
                if seconds <= 0 or not self._changed.wait(seconds):
                    return "older entries are still being removed"
            if length > self._free:
                self._refused = self._refused % _RETRY_BYTES + length
                return "no room is left"
            self._refused = _RETRY_BYTES
            self._free -= length
            self._storing += length
            self._taken += length
            return ""

    def _start_eviction(self) -> None:
        """Make room in a thread; the caller holds the lock."""
        self._is_evicting = True
        self._taken = self._storing
        self._last_moment = time.monotonic() + _MAX_WAIT_SECONDS
        try:
            threading.Thread(target=self._run_eviction, name="qedfuse-evict", daemon=True).start()
        except (RuntimeError, MemoryError):  # the host has no thread
            self._is_evicting = False

    def _run_eviction(self) -> None:
        """Make room, and count it: the main function of the thread."""
        free = 0
        try:
            free = self._evict()
        finally:
            with self._changed:
                self._free = free - self._taken
                self._is_evicting = False
                self._changed.notify_all()
