"""Numbers of statistics: bytes, times and shares as short text, and quantiles of histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.util.sizes import three_digits

if TYPE_CHECKING:
    from collections.abc import Sequence

NONE: Final = "-"
"""Stands for a value that does not exist, such as an average of nothing."""
_BYTE_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_UNIT_FACTOR: Final = 1024
"""How many times larger each unit is than the unit before it."""


def byte_count(count: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in _BYTE_UNITS[:-1]:
        if count < _UNIT_FACTOR:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _UNIT_FACTOR
    return f"{count:.1f} {_BYTE_UNITS[-1]}"


def milliseconds(seconds: float | None) -> str:
    """Return a time in milliseconds, without the unit; `NONE` for None."""
    return NONE if seconds is None else three_digits(seconds * 1e3)


def percent(share: float | None) -> str:
    """Return a share from 0 to 1 in percent, without the percent sign; `NONE` for None."""
    return NONE if share is None else f"{share * 100:.1f}"


def quantile(histogram: Sequence[int], bounds: Sequence[float], share: float) -> float | None:
    """Return an estimate, in seconds, of a quantile of the durations in a histogram.

    Args:
        histogram: How many durations are in each bucket.
        bounds: The upper bound in seconds of each bucket but the last.
        share: The quantile, more than 0 and at most 1.

    Returns:
        The upper bound of the bucket that has the quantile; for the last bucket its lower bound;
        None if the histogram is empty.
    """
    wanted, so_far = share * sum(histogram), 0
    if not wanted:
        return None
    for count, bound in zip(histogram, bounds, strict=False):
        so_far += count
        if so_far >= wanted:
            return bound
    return bounds[-1]
