"""What the library logs, printed as lines of qedimg's own."""

from __future__ import annotations

import logging
import sys
from typing import Final

from qedfuse.errors import QedError


class _Recorder(logging.Handler):
    """Keeps the errors that were logged, so that none of them is printed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[QedError] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the errors that a record shows, without their tracebacks."""
        shown = record.args if isinstance(record.args, tuple) else ()
        self.errors.extend(error.again() for error in shown if isinstance(error, QedError))


_recorder: Final = _Recorder()


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Print the library's log to stderr: warnings; with ``verbose`` more, with ``quiet`` less."""
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="qedimg: %(message)s", level=level, stream=sys.stderr)
    # If stderr cannot be written, the exit code alone reports a failure.
    logging.raiseExceptions = False
    _recorder.errors.clear()
    _recorder.setLevel(level)
    logging.getLogger().addHandler(_recorder)


def was_logged(error: QedError) -> bool:
    """Return whether a line of the log has shown an error."""
    return any(error.equals(logged) for logged in _recorder.errors)
