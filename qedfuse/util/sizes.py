"""Numbers as text: sizes in bytes with binary suffixes (``64K``, ``1.5 GiB``), and others."""

from __future__ import annotations

import re
from typing import Final

from qedfuse.errors import UsageError

_UNITS: Final = "KMGTPE"
_UNIT_FACTOR: Final = 1024
_MIN_ROUNDED: Final = 99.95
"""From this number on, three significant digits include no fraction."""
# Without re.ASCII the Kelvin sign would match K.  The number of digits is limited, because int()
# fails for thousands of digits.
_PATTERN: Final = re.compile(
    r"(?P<number>\d{1,30})(?:\.(?P<fraction>\d{0,100}))?(?:(?P<unit>[kmgtpe])i?)?b?",
    re.IGNORECASE | re.ASCII,
)


def parse_size(text: str) -> int:
    """Return the number of bytes that a text such as ``512``, ``64K``, ``1.5G`` or ``64KiB`` means.

    A binary suffix (K, M, G, T, P or E, also with ``i``) and ``B`` can follow a number.  Case does
    not matter.  As in QEMU, a fraction of a byte is rounded if there is a binary suffix, and
    refused without one (``1.5``).

    Raises:
        UsageError: The text has another form.
    """
    match = _PATTERN.fullmatch(text.strip())
    unit = match and match["unit"]
    fraction = match and match["fraction"]
    if match is None or (fraction and int(fraction) and not unit):
        msg = f"size: found {text!r}, expected a number of bytes such as 512, 64K or 1.5G"
        raise UsageError(msg)
    shift = 10 * (_UNITS.index(unit.upper()) + 1) if unit else 0
    size = int(match["number"]) << shift
    if fraction:
        # Half of a byte is rounded up.
        denominator = 10 ** len(fraction)
        size += ((int(fraction) << (shift + 1)) + denominator) // (2 * denominator)
    return size


def format_size(size: int) -> str:
    """Return a size as text with a unit and at most four digits: ``64 KiB``, ``1.5 GiB``."""
    value = float(size)
    for unit in ("bytes", *(f"{letter}iB" for letter in _UNITS)):
        if value < _UNIT_FACTOR or unit == "EiB":
            break
        value /= _UNIT_FACTOR
    return f"{value:.4g} {unit}"


def three_digits(value: float) -> str:
    """Return a number rounded to three significant digits, or to a whole number if it is large."""
    return f"{value:.0f}" if value >= _MIN_ROUNDED else f"{value:.3g}"
