"""Content looked at unit by unit: which are zeros, which are the same in two buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Mask = NDArray[np.bool_]

_SAMPLES: Final = 4
"""Words of a unit that are looked at before all of it is."""


def zero_units(buffer: Bytes, unit: int) -> Mask:
    """Mark the units of a buffer that hold only zeros; the last one may be cut short."""
    whole = len(buffer) // unit * unit
    rows = buffer[:whole].view(np.uint64).reshape(-1, unit // 8)
    # Most data shows itself in a few words.  What does not is compared in full.
    zero: Mask = np.logical_not(rows[:, :: unit // 8 // _SAMPLES].any(axis=1))
    for row in np.flatnonzero(zero):
        zero[row] = not rows[row].any()
    if whole < len(buffer):
        zero = np.append(zero, not buffer[whole:].any())
    return zero


def same_units(one: Bytes, other: Bytes, unit: int) -> Mask:
    """Mark the units in which two buffers are equal."""
    whole = len(one) // unit * unit
    first = one[:whole].view(np.uint64).reshape(-1, unit // 8)
    second = other[:whole].view(np.uint64).reshape(-1, unit // 8)
    same: Mask = (first == second).all(axis=1)
    if whole < len(one):
        same = np.append(same, np.array_equal(one[whole:], other[whole:]))
    return same


def judge(content: Bytes, unit: int, least: int, below: Bytes | None = None) -> tuple[Mask, Mask]:
    """Tell which units are to be written as data, and which are zeros that have to hide a base.

    Args:
        content: A piece of the disk.
        unit: Bytes.
        least: Bytes; shorter runs of zeros are data, and all zeros are if it is 0.
        below: What the base has there.
    """
    zero = zero_units(content, unit) if least else np.zeros(-(-len(content) // unit), np.bool_)
    if below is not None:
        differs = ~same_units(content, below, unit)
        return differs & ~zero, differs & zero
    if least > unit:
        for first, last in runs(zero):
            # A run that goes on in another piece may be long enough.
            if first > 0 and last < len(zero) and (last - first) * unit < least:
                zero[first:last] = False
    return ~zero, np.zeros(len(zero), np.bool_)


def marked_bytes(mask: Mask, unit: int, length: int) -> int:
    """Count the bytes of the marked units of ``length`` bytes, which may end within the last."""
    past_end = len(mask) * unit - length if len(mask) and mask[-1] else 0
    return int(mask.sum()) * unit - past_end


def runs(mask: Mask) -> list[tuple[int, int]]:
    """Give the ranges of indices, end excluded, in which a mask is true."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
