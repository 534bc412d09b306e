"""Waiting for another thread so that a signal handler's exception can end the wait at any point.

The waits of ``threading.Thread.join``, ``threading.Event`` and ``concurrent.futures.Future`` cannot
be left safely in this way:

- Before Python 3.13, an exception during ``join`` or ``is_alive`` marks a running thread as ended.
  Then Python does not wait for the thread at the end of the program.
- An ``Event`` and a ``Future`` have a lock.  An exception directly after the lock was acquired
  leaves it locked, and the other thread waits for it forever.
"""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Latch:
    """A flag that one thread sets once, and that other threads wait for.

    Attributes:
        is_set: Whether `set` was called.
    """

    def __init__(self) -> None:
        """Create a latch that is not set."""
        self.is_set = False
        # Each wait has a lock of its own, which `set` releases.  A wait that an exception has ended
        # leaves its lock behind, and nothing waits for that lock.
        self._waits: list[threading.Lock] = []

    def set(self) -> None:
        """End all waits; must be called only once."""
        self.is_set = True
        while self._waits:
            self._waits.pop().release()

    def wait(self) -> None:
        """Return when the latch is set."""
        if self.is_set:
            return
        lock = threading.Lock()
        lock.acquire()
        # In this order: `set` sets the flag first, so it finds the lock, or the flag is seen here.
        self._waits.append(lock)
        if not self.is_set:
            lock.acquire()


class Outcome(Latch, Generic[T]):
    """The result or the error of a call that another thread makes."""

    def __init__(self) -> None:
        """Create an outcome without a result."""
        super().__init__()
        self._values: list[T] = []
        self._error: BaseException | None = None

    def set_result(self, value: T) -> None:
        """Let `result` return ``value``."""
        self._values.append(value)
        self.set()

    def set_error(self, error: BaseException) -> None:
        """Let `result` raise ``error``."""
        self._error = error
        self.set()

    def result(self) -> T:
        """Wait until the call has ended; return its result or raise its error.

        The caller can raise an error only once, because this object then no longer refers to it.
        """
        self.wait()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # breaks a cycle: error -> traceback -> this frame
        return self._values[0]
