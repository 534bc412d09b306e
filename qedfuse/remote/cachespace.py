"""Reservations of space in the cache, and the thread that evicts entries to make space."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RETRY_BYTES: Final = 64 << 20
"""After an eviction that freed too little, this number of bytes is refused before the next eviction
begins."""
_MAX_WAIT_SECONDS: Final = 2.0
"""Maximum time, from the start of an eviction, for which reservations wait for its end.  To remove
large entries can take long, and a reader waits until its units are stored or refused."""


class CacheSpace:
    """Counts the bytes that may still be stored in the cache; threads may use it concurrently."""

    def __init__(self, evict: Callable[[], int]) -> None:
        """Begin without space: the first reservation calls ``evict``.

        Args:
            evict: Removes entries of the cache; returns how many bytes may be stored before the
                next call.  Called by one thread at a time.  If it raises CacheError, reservations
                fail for this reason.
        """
        self._evict = evict
        self._changed = threading.Condition()
        # The condition protects the following attributes.
        self._free = 0  # bytes that may be reserved
        self._failure = ""  # why the last eviction has failed
        self._storing = 0  # bytes that are reserved, and perhaps not in the file yet
        self._taken = 0  # bytes that the running eviction has perhaps not counted as used
        # The bytes that were refused since the last eviction for lack of space.  After a
        # reservation that succeeds, the number is `_RETRY_BYTES`, so the next reservation that
        # lacks space starts an eviction.
        self._refused = _RETRY_BYTES
        self._is_evicting = False
        self._wait_end = 0.0  # until when (time.monotonic) reservations wait

    @property
    def is_evicting(self) -> bool:
        """Whether an eviction is running, after which a reservation may succeed."""
        return self._is_evicting

    @contextmanager
    def reserve(self, length: int) -> Iterator[str]:
        """Reserve space for ``length`` bytes, which the ``with`` block stores.

        Yields:
            The reason why the bytes must not be stored; empty if the reservation succeeded.
        """
        reason = self._take(length)
        try:
            yield reason
        finally:
            if not reason:
                with self._changed:
                    self._storing -= length

    def _take(self, length: int) -> str:
        """Reserve ``length`` bytes; return the reason of a failure, or an empty string."""
        with self._changed:
            if length > self._free and not self._is_evicting and self._refused >= _RETRY_BYTES:
                try:
                    self._start_eviction()
                except OSError as error:
                    # Nothing was evicted, so the next reservation tries again.
                    return str(error.strerror)
            while length > self._free and self._is_evicting:
                seconds = self._wait_end - time.monotonic()
                if seconds <= 0 or not self._changed.wait(seconds):
                    return "older entries are still being removed"
            if length > self._free:
                self._refused = self._refused % _RETRY_BYTES + length
                return self._failure or "no room is left"
            self._refused = _RETRY_BYTES
            self._free -= length
            self._storing += length
            self._taken += length
            return ""

    def _start_eviction(self) -> None:
        """Start the thread that evicts entries; the caller holds the lock."""
        self._is_evicting = True
        self._taken = self._storing
        self._wait_end = time.monotonic() + _MAX_WAIT_SECONDS
        try:
            start_thread(self._run_eviction, name="qedfuse-evict")
        except OSError:
            self._is_evicting = False
            raise

    def _run_eviction(self) -> None:
        """Evict entries, and count the space that results."""
        free, failure = 0, ""
        try:
            free = self._evict()
        except CacheError as error:
            failure = str(error)
        finally:
            with self._changed:
                self._failure = failure
                self._free = free - self._taken
                self._is_evicting = False
                self._changed.notify_all()
