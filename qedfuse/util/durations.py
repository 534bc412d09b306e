"""Durations of options: a text with a number of seconds becomes a float."""

from __future__ import annotations

import re
from typing import Final

from qedfuse.errors import UsageError
from qedfuse.text import printable

_PATTERN: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


def parse_duration(text: str, max_seconds: float) -> float:
    """Return the number of seconds in a text such as ``30`` or ``0.5``.

    Raises:
        UsageError: The text has another form, or the number is 0 or more than ``max_seconds``.
    """
    if not _PATTERN.fullmatch(text) or not 0 < (seconds := float(text)) <= max_seconds:
        msg = f"found {printable(text)}, expected seconds, more than 0, up to {max_seconds:.0f}"
        raise UsageError(msg)
    return seconds
