"""What the library logs, as lines of qedimg's own."""

from __future__ import annotations

import logging
import sys
from typing import Final


class _Said(logging.Handler):
    """Keeps in mind what was logged, so that it is not said twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())


_said: Final = _Said()


def set_up_logging(*, quiet: bool, verbose: bool) -> None:
    """Show what the library logs: its warnings, and more or less of it as the user wishes."""
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(format="qedimg: %(message)s", level=level, stream=sys.stderr)
    # Nobody may be listening any more.
    logging.raiseExceptions = False
    _said.lines.clear()
    _said.setLevel(level)
    logging.getLogger().addHandler(_said)


def was_said(text: str) -> bool:
    """Tell whether a failure has been logged already, perhaps with what follows from it."""
    return any(line.startswith(text) for line in _said.lines)
