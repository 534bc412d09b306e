"""Sizes in bytes with binary suffixes: parsing (``64K``) and formatting (``1.5 GiB``)."""

from __future__ import annotations

import re
from typing import Final

from qedfuse.errors import UsageError

_UNITS: Final = "KMGTPE"
_UNIT_FACTOR: Final = 1024
# Use re.ASCII, because otherwise the Kelvin sign would match K.  Accept at most 30 digits,
# because for thousands of digits int() raises a ValueError.
_PATTERN: Final = re.compile(
    r"(?P<number>\d{1,30})(?:(?P<unit>[kmgtpe])i?)?b?", re.IGNORECASE | re.ASCII
)


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as ``512``, ``64K`` or ``64KiB`` means.

    The text is a whole number.  A binary suffix (K, M, G, T, P or E, also with ``i``) and ``B`` can
    follow.  Case does not matter.

    Raises:
        UsageError: The text has another form.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        msg = f"size: found {text!r}, expected a number of bytes such as 512, 64K or 10G"
        raise UsageError(msg)
    unit = match["unit"]
    power = _UNITS.index(unit.upper()) + 1 if unit else 0
    return int(match["number"]) << (10 * power)


def format_size(size: int) -> str:
    """Return a size in bytes as text with a binary unit: ``64 KiB``, ``1.5 GiB``.

    The number is rounded to four significant digits.
    """
    value = float(size)
    for unit in ("bytes", *(f"{letter}iB" for letter in _UNITS)):
        if value < _UNIT_FACTOR or unit == "EiB":
            break
        value /= _UNIT_FACTOR
    return f"{value:.4g} {unit}"
