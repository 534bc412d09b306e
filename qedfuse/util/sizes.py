"""Sizes as people write them (``64K``, ``10G``) and as they like to read them."""

from __future__ import annotations

import re
from typing import Final

from qedfuse.errors import UsageError

_UNITS: Final = "KMGTPE"
_STEP: Final = 1024
# ASCII, or the Kelvin sign would be a K; few digits, or int() would refuse them.
_PATTERN: Final = re.compile(
    r"(?P<number>\d{1,30})(?:(?P<unit>[kmgtpe])i?)?b?", re.IGNORECASE | re.ASCII
)


def parse_size(text: str) -> int:
    """Read a size in bytes, with a binary suffix K, M, G, T, P or E if there is one.

    Raises:
        UsageError: It is not a size.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        msg = f"size: found {text!r}, expected a number of bytes such as 512, 64K or 10G"
        raise UsageError(msg)
    unit = match["unit"]
    power = _UNITS.index(unit.upper()) + 1 if unit else 0
    return int(match["number"]) << (10 * power)


def format_size(size: int) -> str:
    """Write a size for people: ``64 KiB``, ``1.5 GiB``."""
    value = float(size)
    for unit in ("bytes", *(f"{letter}iB" for letter in _UNITS)):
        if value < _STEP or unit == "EiB":
            break
        value /= _STEP
    return f"{value:.4g} {unit}"
