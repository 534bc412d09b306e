"""What the library logs, printed as lines of qedimg's own."""

from __future__ import annotations

import logging
import sys
from typing import Final


class _Recorder(logging.Handler):
    """Keeps the messages that were logged, so that an error is not printed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record."""
        self.messages.append(record.getMessage())


_recorder: Final = _Recorder()


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Print the library's log to stderr: warnings; with ``verbose`` more, with ``quiet`` less."""
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="qedimg: %(message)s", level=level, stream=sys.stderr)
    # If stderr cannot be written, the exit code alone reports a failure.
    logging.raiseExceptions = False
    _recorder.messages.clear()
    _recorder.setLevel(level)
    logging.getLogger().addHandler(_recorder)


def was_logged(text: str) -> bool:
    """Return whether a message that begins with ``text`` has been printed."""
    return any(message.startswith(text) for message in _recorder.messages)
