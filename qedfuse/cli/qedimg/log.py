"""The log of the library, printed to stderr in the form of qedimg's messages."""

from __future__ import annotations

import logging
import sys
from typing import Final

from qedfuse.errors import QedError

_OUTAGES: Final = "qedfuse.remote.outagelog"
"""The logger of messages about outages of servers."""


def _is_shown(record: logging.LogRecord) -> bool:
    """Return False for a message about an outage; `main` prints an outage that ends the command."""
    return record.name != _OUTAGES


class _Recorder(logging.Handler):
    """Keeps the errors that the log has shown, so that `main` does not print them again."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[QedError] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a copy, without traceback, of each error that is an argument of a record."""
        shown = record.args if isinstance(record.args, tuple) else ()
        self.errors.extend(error.again() for error in shown if isinstance(error, QedError))


_recorder: Final = _Recorder()


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Make the library's messages appear on stderr, if their level is at least WARNING.

    With ``verbose`` the lowest level is INFO, and with ``quiet`` it is ERROR.
    """
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_shown)
    logging.basicConfig(format="qedimg: %(message)s", level=level, handlers=[handler])
    # Drop messages that cannot be written to stderr; by default `logging` would print a traceback.
    logging.raiseExceptions = False
    _recorder.errors.clear()
    _recorder.addFilter(_is_shown)
    _recorder.setLevel(level)
    logging.getLogger().addHandler(_recorder)


def was_logged(error: QedError) -> bool:
    """Return whether the log has shown an error that equals ``error`` since `set_up_logging`."""
    return any(error.equals(logged) for logged in _recorder.errors)
