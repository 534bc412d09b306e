"""Closing files: those that threads may still use, and several of which one may fail to close.

If a thread closed a descriptor that another thread is about to use, the kernel could give its
number to another file in between.  So the last user closes such files.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class _Closable(Protocol):
    """A file."""

    def close(self) -> None:
        """Close the file."""


def close_all(files: Sequence[_Closable]) -> None:
    """Close files in order, also those after one whose close fails; raise the last error."""
    with ExitStack() as stack:
        for file in reversed(files):
            stack.callback(file.close)


class DeferredClose:
    """Counts the users of some files; closes the files once `close` is called and no user is left.

    A thread uses the files between a call of `enter` that returns True and a call of `leave`.
    Threads may call all methods concurrently.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        """Begin without users; ``close`` closes the files, and is called once, in any thread."""
        self._close = close
        self._lock = threading.Lock()
        # The object itself counts as a user until `close` is called.
        self._users = 1
        self._is_closed = False

    def enter(self) -> bool:
        """Count a user, who must call `leave`, and return True; after `close` only return False."""
        with self._lock:
            if self._is_closed:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """Count a user as gone; close the files if no user is left and `close` was called."""
        with self._lock:
            self._users -= 1
            is_last = not self._users
        if is_last:
            self._close()

    def close(self) -> None:
        """Close the files now, or when the last user leaves; a second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self.leave()
