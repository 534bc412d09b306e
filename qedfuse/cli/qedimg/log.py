"""The log of the library, printed to stderr in the form of qedimg's messages."""

from __future__ import annotations

import logging
import sys
from typing import Final

from qedfuse.errors import QedError


class _Recorder(logging.Handler):
    """Keeps the errors that the log has shown, so that `main` does not print them again."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[QedError] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep copies of the errors that are arguments of a record, without tracebacks."""
        shown = record.args if isinstance(record.args, tuple) else ()
        self.errors.extend(error.again() for error in shown if isinstance(error, QedError))


_recorder: Final = _Recorder()


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """From now on print messages of the library to stderr, if their level is at least WARNING.

    With ``verbose`` the lowest level is INFO, and with ``quiet`` it is ERROR.
    """
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="qedimg: %(message)s", level=level, stream=sys.stderr)
    # A command ends at the first error of a server, and prints this error itself.
    logging.getLogger("qedfuse.remote.outagelog").setLevel(logging.CRITICAL)
    # If stderr cannot be written to, `logging` must not print a traceback, because the exit code
    # reports the failure.
    logging.raiseExceptions = False
    _recorder.errors.clear()
    _recorder.setLevel(level)
    logging.getLogger().addHandler(_recorder)


def was_logged(error: QedError) -> bool:
    """Return whether the log has shown an error that equals ``error`` since `set_up_logging`."""
    return any(error.equals(logged) for logged in _recorder.errors)
