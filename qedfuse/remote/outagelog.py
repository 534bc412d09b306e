"""The log of outages: one line when an object can no longer be read, and one when it can again.

There are two kinds of outages: the server does not serve the object, or it has another version.

A server that often fails for a short time would fill the log.  So an outage is not logged if the
last logged outage of the same kind began less than a minute before.  `RemoteError.is_logged` of an
error says whether its outage was logged.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Final

from qedfuse.errors import ObjectChangedError, RemoteError

_log = logging.getLogger(__name__)

_MIN_SECONDS_BETWEEN: Final = 60.0
"""Minimum time between the beginnings of two logged outages of the same kind."""


class OutageLog:
    """Logs the outages of one object's server.  Threads may use the log concurrently."""

    def __init__(self, name: str, consequence: str) -> None:
        """Log outages of the server of the object ``name``.

        The line at the beginning of an outage ends with ``consequence``.
        """
        self._name = name
        self._consequence = consequence
        self._lock = threading.Lock()
        self._kind: type[RemoteError] | None = None  # of the present outage
        self._is_logged = False  # whether the present outage was logged
        # Whether an outage was logged since the last answer.  Outages of both kinds may follow each
        # other without an answer.
        self._awaits_end = False
        self._begun = 0.0  # time.monotonic() when the present outage began
        # For each kind, when the last outage that was logged began.
        self._last_logged: dict[type[RemoteError], float] = {}

    def failed(self, error: RemoteError) -> None:
        """Record a failed request, and log the error if it begins an outage that must be logged.

        If the present outage was logged, `RemoteError.is_logged` of ``error`` is set.
        """
        kind = ObjectChangedError if isinstance(error, ObjectChangedError) else RemoteError
        with self._lock:
            begins, self._kind = self._kind is not kind, kind
            must_log = False
            if begins:
                now = self._begun = time.monotonic()
                last = self._last_logged.get(kind)
                must_log = self._is_logged = last is None or now - last >= _MIN_SECONDS_BETWEEN
                if must_log:
                    self._last_logged[kind] = now
                    self._awaits_end = True
            error.is_logged = self._is_logged
        if must_log:
            _log.error("%s; %s", error, self._consequence)

    def answered(self, sent: float = math.inf) -> None:
        """End the present outage; log the end if a beginning was logged since the last answer.

        Args:
            sent: The time (`time.monotonic`) at which the request was sent.  If that was before the
                outage began, the answer does not end it.  By default it always does.
        """
        with self._lock:
            if self._kind is not None and sent <= self._begun:
                return
            must_log = self._awaits_end
            self._kind, self._is_logged, self._awaits_end = None, False, False
        if must_log:
            _log.warning("%s: answers again", self._name)


def closed_error(name: str) -> RemoteError:
    """Return the error for a read of the file ``name`` after the file was closed."""
    error = RemoteError(f"{name}: found the file closed, expected it open")
    error.is_logged = True  # needs no line in the log: the file was closed on purpose
    return error
