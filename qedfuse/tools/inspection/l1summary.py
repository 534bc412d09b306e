"""A summary of an image's L1 table, read without numpy and trio."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.hostio.sparse import data_slices
from qedfuse.ondisk.constants import ENTRY_BYTES, MAX_OFFSET, UNALLOCATED
from qedfuse.ondisk.entrylimits import EntryLimits, overlaps
from qedfuse.ondisk.table import SLICE_BYTES, decode

if TYPE_CHECKING:
    from qedfuse.ondisk.header import Header

MAX_L1_BYTES: Final = 8 << 20
"""Bytes of an L1 table that are read, not counting zeros; the default table has 256 KiB."""


@dataclass(frozen=True, slots=True)
class L1Summary:
    """The entries of an L1 table, counted.

    Attributes:
        used: Entries that are not 0.
        invalid: Entries in use that do not point to a table.
        overlapping: Tables that share clusters with a table before them in the file.
        complete: Whether all of the table was read.
    """

    used: int = 0
    invalid: int = 0
    overlapping: int = 0
    complete: bool = False


def summarize_l1(fd: int, header: Header, file_size: int) -> L1Summary:
    """Read the L1 table of an open image, up to `MAX_L1_BYTES` of it, and count its entries.

    Raises:
        OSError: The file cannot be read.
    """
    if header.l1_table_offset > MAX_OFFSET:
        return L1Summary()
    limits = EntryLimits.for_l1(header, file_size)
    used = 0
    tables: list[int] = []
    start, left, complete = header.l1_table_offset, MAX_L1_BYTES, True
    end = min(header.l1_end, file_size)
    for offset in data_slices(fd, start, end - start):
        raw = os.pread(fd, min(SLICE_BYTES, end - offset), offset) if left > 0 else b""
        if not raw:
            complete = False
            break
        if raw.count(0) == len(raw):
            continue
        left -= SLICE_BYTES
        entries = decode(raw[: len(raw) & -ENTRY_BYTES])
        values = [value for value in entries if value != UNALLOCATED]
        used += len(values)
        tables += [value for value in values if limits.is_valid(value)]
    overlapping = sum(overlaps(sorted(tables), limits.table_bytes))
    return L1Summary(used, used - len(tables), overlapping, complete)
