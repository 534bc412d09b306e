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
    """Print the library's log to stderr from now on, beginning with the level WARNING.

    With ``verbose`` it begins with INFO, and with ``quiet`` with ERROR.
    """
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="qedimg: %(message)s", level=level, stream=sys.stderr)
    # Do not let `logging` print a traceback if stderr cannot be written to: the exit code
    # reports the failure.
    logging.raiseExceptions = False
    _recorder.errors.clear()
    _recorder.setLevel(level)
    logging.getLogger().addHandler(_recorder)


def was_logged(error: QedError) -> bool:
    """Return whether the log has shown an error that equals ``error`` since it was set up."""
    return any(error.equals(logged) for logged in _recorder.errors)
