"""Table entries: eight bytes each, little-endian, in an ``array('Q')``.

An array decodes a default table 300 times faster than construct does, and slices,
compares and writes back without copying through Python integers.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterator

SLICE_BYTES: Final = 1 << 16
"""Tables are read, cached and written in pieces of at most this many bytes."""

_SKIP: Final = 1024
_HOLE: Final = array("Q", bytes(_SKIP * ENTRY_BYTES))
_BIG_ENDIAN: Final = sys.byteorder == "big"


def decode(raw: bytes | bytearray) -> array[int]:
    """Turn the bytes of a table, or of a part of one, into entries."""
    entries = array("Q")
    entries.frombytes(raw)
    if _BIG_ENDIAN:
        entries.byteswap()
    return entries


def slice_start(table: int, offset: int, slice_bytes: int = SLICE_BYTES) -> int:
    """Return the file offset of the slice that an offset within a table lies in.

    Slices begin at multiples of ``slice_bytes`` from the beginning of the table.
    """
    return offset - (offset - table) % slice_bytes


def encode(entries: array[int], first: int, last: int) -> bytes:
    """Turn the entries from index ``first`` up to, not including, ``last`` into bytes."""
    part = entries[first:last]
    if _BIG_ENDIAN:
        part.byteswap()
    return part.tobytes()


def runs(
    entries: array[int], first: int, last: int, cluster_size: int
) -> Iterator[tuple[int, int, int]]:
    """Cut the entries from ``first`` up to ``last`` into runs that can be handled as one.

    Yields:
        (index of the first entry, number of entries, value of the first entry).  Within
        a run all entries are unallocated, or all are zero clusters, or each points one
        cluster behind the one before it.
    """
    index = first
    while index < last:
        value = entries[index]
        end = index + 1
        if value > ZERO:
            expected = value + cluster_size
            while end < last and entries[end] == expected:
                end += 1
                expected += cluster_size
        else:
            if value == UNALLOCATED:
                while end + _SKIP <= last and entries[end : end + _SKIP] == _HOLE:
                    end += _SKIP
            while end < last and entries[end] == value:
                end += 1
        yield index, end - index, value
        index = end
