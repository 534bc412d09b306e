"""Distinguishing an object's own blocks of zeros from holes of the cache's data file.

The kernel returns zeros for a hole without reading from the disk, and a failed write can leave a
hole where the object has data.  So zeros from the data file are valid only in a block that is
recorded as all zeros.  The record is made when a unit (`qedfuse.remote.unitfile`) was fetched, or
when its cached content was compared with its checksum.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from qedfuse.remote.unitfile import UNIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import Buffer

BLOCK_BYTES: Final = UNIT_BYTES // 64
"""Size of a block, and so of the smallest hole that is recognised: 4096 bytes."""
_ZEROS: Final = bytes(BLOCK_BYTES)


class ZeroBlocks:
    """Which blocks of an object are known to be all zeros.  Threads may use it concurrently.

    Attributes:
        masks: For each unit, a 64-bit number with a bit for each block that is known to be all
            zeros.  Empty if the host has no memory for the numbers.
    """

    def __init__(self, units: int) -> None:
        """Prepare for an object of ``units`` units; no block is known to be all zeros yet."""
        try:
            # The kernel allocates memory only for pages that are written to.
            self.masks = memoryview(mmap.mmap(-1, max(1, units) * 8, mmap.MAP_PRIVATE)).cast("Q")
        except (OSError, OverflowError):
            self.masks = memoryview(b"").cast("Q")

    def record(self, unit: int, content: Buffer) -> None:
        """Record which blocks of a unit with this content are all zeros."""
        mask = sum(1 << number for number in _zero_blocks(memoryview(content)))
        if mask and unit < len(self.masks):
            self.masks[unit] = mask

    def may_have_holes(self, offset: int, view: memoryview) -> bool:
        """Return whether a block was read as zeros, but is not recorded as a block of zeros.

        If the read covers a block in part, only that part is examined.

        Args:
            offset: The offset of the read in the object.
            view: The bytes that were read.
        """
        begin = min(-offset % BLOCK_BYTES, len(view))
        if begin and view[:begin] == _ZEROS[:begin] and not self._is_known(offset):
            return True
        offset += begin
        return any(
            not self._is_known(offset + number * BLOCK_BYTES)
            for number in _zero_blocks(view[begin:])
        )

    def _is_known(self, offset: int) -> bool:
        """Return whether the block at an offset is known to be all zeros."""
        unit, within = divmod(offset, UNIT_BYTES)
        return unit < len(self.masks) and bool(self.masks[unit] >> within // BLOCK_BYTES & 1)


def _zero_blocks(view: memoryview) -> Iterator[int]:
    """Yield the numbers of the blocks of ``view`` that are all zeros; the last may be shorter."""
    first_bytes = bytes(view[::BLOCK_BYTES])  # of each block
    number = first_bytes.find(0)
    while number >= 0:
        block = view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        if block == _ZEROS[: len(block)]:
            yield number
        number = first_bytes.find(0, number + 1)
