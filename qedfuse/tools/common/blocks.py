"""Content looked at unit by unit: which are zeros, which are the same in two buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Mask = NDArray[np.bool_]

_SAMPLED_WORDS_PER_BLOCK: Final = 4
"""Words of a unit that are looked at before all of it is."""


def zero_blocks(buffer: Bytes, block_size: int) -> Mask:
    """Mark the units of a buffer that hold only zeros; the last one may be cut short."""
    whole = len(buffer) // block_size * block_size
    rows = buffer[:whole].view(np.uint64).reshape(-1, block_size // 8)
    # Most data shows itself in a few words.  What does not is compared in full.
    zero: Mask = np.logical_not(rows[:, :: block_size // 8 // _SAMPLED_WORDS_PER_BLOCK].any(axis=1))
    for row in np.flatnonzero(zero):
        zero[row] = not rows[row].any()
    if whole < len(buffer):
        zero = np.append(zero, not buffer[whole:].any())
    return zero


def equal_blocks(one: Bytes, other: Bytes, block_size: int) -> Mask:
    """Mark the units in which two buffers are equal."""
    whole = len(one) // block_size * block_size
    first = one[:whole].view(np.uint64).reshape(-1, block_size // 8)
    second = other[:whole].view(np.uint64).reshape(-1, block_size // 8)
    same: Mask = (first == second).all(axis=1)
    if whole < len(one):
        same = np.append(same, np.array_equal(one[whole:], other[whole:]))
    return same


def classify(
    content: Bytes, block_size: int, least: int, below: Bytes | None = None
) -> tuple[Mask, Mask]:
    """Tell which units are to be written as data, and which are zeros that have to hide a base.

    Args:
        content: A piece of the disk.
        block_size: Bytes.
        least: Bytes; shorter runs of zeros are data, and all zeros are if it is 0.
        below: What the base has there.
    """
    zero = (
        zero_blocks(content, block_size)
        if least
        else np.zeros(-(-len(content) // block_size), np.bool_)
    )
    if below is not None:
        differs = ~equal_blocks(content, below, block_size)
        return differs & ~zero, differs & zero
    if least > block_size:
        for first, last in mask_ranges(zero):
            # A run that goes on in another piece may be long enough.
            if first > 0 and last < len(zero) and (last - first) * block_size < least:
                zero[first:last] = False
    return ~zero, np.zeros(len(zero), np.bool_)


def masked_bytes(mask: Mask, block_size: int, length: int) -> int:
    """Count the bytes of the marked units of ``length`` bytes, which may end within the last."""
    past_end = len(mask) * block_size - length if len(mask) and mask[-1] else 0
    return int(mask.sum()) * block_size - past_end


def mask_ranges(mask: Mask) -> list[tuple[int, int]]:
    """Give the ranges of indices, end excluded, in which a mask is true."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
