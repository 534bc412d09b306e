"""Masks of blocks: which blocks of a buffer are zeros, and which are equal in two buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Mask = NDArray[np.bool_]

_SAMPLED_WORDS_PER_BLOCK: Final = 4
"""Minimum number of 64-bit words of each block that are tested before the whole block."""


def zero_blocks(buffer: Bytes, block_size: int) -> Mask:
    """Return a mask of the blocks that hold only zeros; the last block may be incomplete.

    ``block_size`` is in bytes, a multiple of 8, and at least 32.
    """
    whole = len(buffer) // block_size * block_size
    rows = buffer[:whole].view(np.uint64).reshape(-1, block_size // 8)
    # Only blocks in which all sampled words are zero are read in full; data has few such blocks.
    zero: Mask = np.logical_not(rows[:, :: block_size // 8 // _SAMPLED_WORDS_PER_BLOCK].any(axis=1))
    for row in np.flatnonzero(zero):
        zero[row] = not rows[row].any()
    if whole < len(buffer):
        zero = np.append(zero, not buffer[whole:].any())
    return zero


def equal_blocks(one: Bytes, other: Bytes, block_size: int) -> Mask:
    """Return a mask of the equal blocks of two buffers of the same length.

    The last block may be incomplete.  ``block_size`` is in bytes, and a multiple of 8.
    """
    whole = len(one) // block_size * block_size
    first = one[:whole].view(np.uint64).reshape(-1, block_size // 8)
    second = other[:whole].view(np.uint64).reshape(-1, block_size // 8)
    equal: Mask = (first == second).all(axis=1)
    if whole < len(one):
        equal = np.append(equal, np.array_equal(one[whole:], other[whole:]))
    return equal


def classify(
    content: Bytes, block_size: int, min_zero_bytes: int, base: Bytes | None = None
) -> tuple[Mask, Mask]:
    """Return two masks: the blocks to write as data, and the blocks to write as zeros.

    A block in neither mask need not be written.  Without a base no block is in the second mask,
    because an unwritten block of the target reads as zeros.

    Args:
        content: A chunk of the disk.
        block_size: Bytes in a block.
        min_zero_bytes: Without a base, a shorter run of zero blocks counts as data, unless it
            touches an end of the chunk.  With 0, zeros are treated like other data.
        base: Content of the base in the same range; None without a base.  Blocks that are equal in
            both are in neither mask.
    """
    count = -(-len(content) // block_size)
    zero = zero_blocks(content, block_size) if min_zero_bytes else np.zeros(count, np.bool_)
    if base is not None:
        differs = ~equal_blocks(content, base, block_size)
        return differs & ~zero, differs & zero
    if min_zero_bytes > block_size:
        for first, last in mask_ranges(zero):
            # A run at an end of the chunk stays zeros, because it may continue in the chunk before
            # or after this one.
            at_an_end = first == 0 or last == len(zero)
            if not at_an_end and (last - first) * block_size < min_zero_bytes:
                zero[first:last] = False
    return ~zero, np.zeros(len(zero), np.bool_)


def masked_bytes(mask: Mask, block_size: int, length: int) -> int:
    """Return the number of bytes in the blocks that a mask marks, in a chunk of ``length`` bytes.

    The last block of the chunk may be incomplete.
    """
    past_end = len(mask) * block_size - length if len(mask) and mask[-1] else 0
    return int(mask.sum()) * block_size - past_end


def mask_ranges(mask: Mask) -> list[tuple[int, int]]:
    """Return the runs of true values in a mask as (first index, last index + 1)."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(first), int(last)) for first, last in edges.reshape(-1, 2)]
