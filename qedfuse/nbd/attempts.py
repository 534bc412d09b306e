"""When a read from an NBD server is tried again after a failure, and which failures are final."""

from __future__ import annotations

import errno
import os
import random
import time
from typing import TYPE_CHECKING, Final

from qedfuse.errors import ObjectChangedError, RemoteError
from qedfuse.nbd.failures import BrokenError, ProtocolError, RefusedError, ReplyError
from qedfuse.remote.outagelog import closed_error

if TYPE_CHECKING:
    from qedfuse.remote.options import Deadlines
    from qedfuse.remote.outagelog import OutageLog

_FIRST_PAUSE_SECONDS: Final = 0.1
_MAX_PAUSE_SECONDS: Final = 5.0
_MAX_PROTOCOL_ERRORS: Final = 2
"""A read fails after this number of protocol errors: the server probably has a bug."""


class Attempts:
    """The attempts of one read.

    Attributes:
        end: The time (`time.monotonic`) at which all waiting ends, and after which no attempt
            begins.
    """

    def __init__(
        self, name: str, deadlines: Deadlines, outages: OutageLog, *, is_brief: bool = False
    ) -> None:
        """Start the time limit of the read.

        Args:
            name: The name of the file in messages.
            deadlines: The read fails after `Deadlines.total_seconds`.
            outages: Gets the error with which the read fails.  Two errors do not count: the file
                was closed, or the server has answered the read with an error other than ESHUTDOWN.
            is_brief: Whether the read fails after `Deadlines.attempt_seconds` already.
        """
        seconds = deadlines.total_seconds
        if is_brief:
            seconds = min(seconds, deadlines.attempt_seconds)
        self.end = time.monotonic() + seconds
        self._name = name
        self._outages = outages
        self._pause = _FIRST_PAUSE_SECONDS
        self._count = self._protocol_errors = 0

    def pause_after(
        self, error: BrokenError | RefusedError | ReplyError, *, is_closed: bool
    ) -> float:
        """Return how many seconds to wait after a failed attempt before the next attempt.

        Raises:
            RemoteError: No further attempt is made.  The time is over, the file was closed, or the
                server refuses the export, has answered with an error other than ESHUTDOWN, or has
                violated the protocol `_MAX_PROTOCOL_ERRORS` times.
        """
        self._count += 1
        if is_closed:
            raise closed_error(self._name) from error
        if isinstance(error, RefusedError):
            # The export existed when it was opened, so the reader gets ESTALE and not ENOENT.
            is_gone = error.errno == errno.ENOENT
            raise self._final(str(error), errno.ESTALE if is_gone else error.errno) from error
        if isinstance(error, ReplyError) and error.errno != errno.ESHUTDOWN:
            text = f"{os.strerror(error.errno)} ({error.text})" if error.text else ""
            msg = f"{self._name}: read: found an error of the server: "
            raise RemoteError(msg + (text or os.strerror(error.errno)), error.errno) from error
        self._protocol_errors += isinstance(error, ProtocolError)
        seconds = self._pause * random.uniform(0.5, 1)  # noqa: S311  no secret
        is_late = time.monotonic() + seconds >= self.end
        if is_late or self._protocol_errors >= _MAX_PROTOCOL_ERRORS:
            msg = f"{error} (attempts: {self._count})"
            raise self._final(msg, errno.EIO) from error
        if self._count == 1:
            # Most likely the server has closed an idle connection, so no pause is needed.
            return 0
        self._pause = min(_MAX_PAUSE_SECONDS, 2 * self._pause)
        return seconds

    def _final(self, text: str, number: int) -> RemoteError:
        """Report the error of the read to the log of outages, and return the error."""
        msg = f"{self._name}: {text}"
        is_changed = number == errno.ESTALE
        failure = ObjectChangedError(msg) if is_changed else RemoteError(msg, number)
        self._outages.failed(failure)
        return failure
