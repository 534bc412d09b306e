"""Silent servers: a fill has failed, and the server has answered nothing since.

A *fill* reads the content of the bases for a cluster that a write covers only in part.  While a
server does not answer, each fill fails after the time limit of the server.  The kernel sends a
limited number of writes at a time, so without a further limit, closing a file with many dirty pages
would take the time limit again and again.  So a fill has little time if a fill has just failed.

A server that only answers slowly must not make the guest lose writes by this limit.  So as soon as
it has answered anything, fills have their whole time again.  A fill that waits for another server,
for the cache or for a local file has its whole time as well.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from qedfuse.errors import RemoteError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

_RECENT_SECONDS: Final = 1.0
"""A fill that begins later than this after the last failure has its whole time."""
_MIN_SECONDS: Final = 1.0
"""How long a fill waits at least for a silent server."""


class ServerSilence:
    """Limits how long fills wait for the server of one file while it does not answer.

    Threads may use the object concurrently.
    """

    def __init__(self, attempt_seconds: float) -> None:
        """Begin without silence.

        ``attempt_seconds`` limits one attempt to get an answer.  For this time after a failure no
        fill gives up, so that a server that answers at all has time to answer.
        """
        self._attempt_seconds = attempt_seconds
        self._lock = threading.Lock()
        # The last failure (without a traceback), if the server has answered nothing since then.
        self._failure: RemoteError | None = None
        self._begun = 0.0  # when it happened
        self._last = 0.0  # when a fill has last failed or given up

    def answered(self) -> None:
        """Record that the server has sent bytes of the file: the silence ends."""
        with self._lock:
            self._failure = None

    @property
    def is_recent(self) -> bool:
        """Whether the server is silent, and a fill has failed within the last second."""
        with self._lock:
            is_silent = self._failure is not None
            return is_silent and time.monotonic() - self._last <= _RECENT_SECONDS

    @contextmanager
    def waiting(self, needs_server: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Mark a block in which a task may wait for the server.

        If the block raises a `RemoteError` during a fill, the silence begins.  ``needs_server``
        returns whether the task waits for the server at present, and not for the cache.
        """
        fill = _current_fill.get()
        if fill is None:
            yield
            return
        fill.silence, fill.needs_server, fill.since = self, needs_server, None
        try:
            yield
        except RemoteError as error:
            with self._lock:
                self._failure = error.again()
                self._begun = self._last = time.monotonic()
            raise
        finally:
            fill.silence = None

    def give_up(self, since: float) -> RemoteError | None:
        """Return the error of a fill that has waited since a time; None if it must wait on."""
        with self._lock:
            now = time.monotonic()
            end = max(since + _MIN_SECONDS, self._begun + self._attempt_seconds)
            if self._failure is None or now < end:
                return None
            self._last = now
            return self._failure.again()


class Fill:
    """A fill, and for which server it waits.

    Attributes:
        silence: Belongs to the server that the fill may wait for; None for none.
        needs_server: Returns whether the fill waits for this server at present.
        since: Since when it waits; None if that is not known yet.
    """

    def __init__(self) -> None:
        """Make a fill that waits for no server."""
        self.silence: ServerSilence | None = None
        self.needs_server: Callable[[], bool] = lambda: False
        self.since: float | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the block in which the task carries out the fill."""
        token = _current_fill.set(self)
        try:
            yield
        finally:
            _current_fill.reset(token)

    def give_up(self, limited: Collection[ServerSilence]) -> RemoteError | None:
        """Return the error with which the fill must fail now; None if it must wait on.

        ``limited`` has the silences that were recent when the fill began.  The caller must call the
        method several times a second.
        """
        silence = self.silence
        if silence is None or silence not in limited or not self.needs_server():
            self.since = None
            return None
        if self.since is None:
            self.since = time.monotonic()
        return silence.give_up(self.since)


_current_fill: ContextVar[Fill | None] = ContextVar("_current_fill", default=None)
