"""Reading the tables of an image for a check, and telling good entries from bad ones.

Everything is done on whole slices with numpy: a full 1 TiB image has 16.7 million entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import trio

from qedfuse.check.findings import Code
from qedfuse.ondisk.constants import ENTRY_BYTES, MIN_CLUSTER_SIZE, UNALLOCATED, ZERO
from qedfuse.ondisk.table import SLICE_BYTES, decode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

    Values = NDArray[np.uint64]
    Mask = NDArray[np.bool_]


def read_table(file: HostFile, header: Header, start: int) -> AsyncIterator[tuple[int, Values]]:
    """Read a table in slices of at most 64 KiB, skipping the holes of a sparse file.

    Yields:
        (index of the first entry, the entries).  Lets other tasks run in between.
    """
    return _Slices(file, start, start + header.geometry.table_bytes)


class _Slices:
    """The slices of a table.  No generator: those complain where an error ends a loop early."""

    def __init__(self, file: HostFile, start: int, end: int) -> None:
        self._file = file
        self._start = start
        self._end = end
        self._position = start

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Values]:
        await trio.lowlevel.checkpoint()
        data = await self._file.next_data(self._position)
        if data is None or data >= self._end:
            raise StopAsyncIteration
        position = max(self._position, data - (data - self._start) % SLICE_BYTES)
        self._position = position + SLICE_BYTES
        raw = await self._file.pread(position, min(SLICE_BYTES, self._end - position))
        entries = decode(raw[: len(raw) & -ENTRY_BYTES])
        return (position - self._start) // ENTRY_BYTES, np.frombuffer(entries, np.uint64)


_RESERVED: Final = np.uint64(MIN_CLUSTER_SIZE - 1)
"""Bits of an entry that no offset has, whatever the cluster size."""


@dataclass(slots=True)
class Layout:
    """Where things lie in the file, and so where entries may point.

    Attributes:
        tables: File offsets of the L2 tables known so far, sorted.
    """

    header: Header
    file_size: int
    tables: Values

    def judge_tables(self, values: Values) -> Iterator[tuple[Code, Mask]]:
        """Sort out the L1 entries that cannot be right; the kinds exclude each other."""
        header, geometry = self.header, self.header.geometry
        left = values != UNALLOCATED
        rules = (
            (Code.L1_RESERVED_BITS, (values & _RESERVED) != 0),
            (Code.L1_UNALIGNED, (values & np.uint64(geometry.cluster_mask)) != 0),
            (Code.L1_OUT_OF_FILE, values >= self.file_size),
            (
                Code.L1_OVER_METADATA,
                (values < header.header_end)
                | (
                    (values < header.l1_end)
                    & (values > max(0, header.l1_table_offset - geometry.table_bytes))
                ),
            ),
            (Code.L1_CUT_SHORT, values > max(0, self.file_size - geometry.table_bytes)),
        )
        for code, rule in rules:
            yield code, left & rule
            left &= ~rule

    def judge_clusters(self, values: Values) -> Iterator[tuple[Code, Mask]]:
        """Sort out the L2 entries that cannot be right; the kinds exclude each other."""
        header, geometry = self.header, self.header.geometry
        left = values > ZERO
        over = (values < header.header_end) | (
            (values >= header.l1_table_offset) & (values < header.l1_end)
        )
        over |= self.table_under(values) >= 0
        rules = (
            (Code.L2_RESERVED_BITS, (values & _RESERVED) != 0),
            (Code.L2_UNALIGNED, (values & np.uint64(geometry.cluster_mask)) != 0),
            (Code.L2_OUT_OF_FILE, values >= self.file_size),
            (Code.L2_OVER_METADATA, over),
            (Code.L2_CUT_SHORT, values > max(0, self.file_size - geometry.cluster_size)),
        )
        for code, rule in rules:
            yield code, left & rule
            left &= ~rule

    def table_under(self, values: Values) -> NDArray[np.intp]:
        """Tell over which of the tables each file offset lies; -1 if over none."""
        if not len(self.tables):
            return np.full(len(values), -1)
        place = np.searchsorted(self.tables, values, "right") - 1
        inside = values - self.tables[place] < self.header.geometry.table_bytes
        return np.where(inside, place, -1)

    def expected(self, code: Code) -> str:
        """Say what an entry should have been."""
        size = self.header.geometry.cluster_size
        return {
            Code.L1_RESERVED_BITS: "0 or an offset whose low 12 bits are 0",
            Code.L2_RESERVED_BITS: "0, 1 or an offset whose low 12 bits are 0",
            Code.L1_UNALIGNED: f"a multiple of {size}",
            Code.L2_UNALIGNED: f"a multiple of {size}",
            Code.L1_OUT_OF_FILE: f"a table inside the file of {self.file_size} bytes",
            Code.L1_CUT_SHORT: f"a whole table inside the file of {self.file_size} bytes",
            Code.L2_OUT_OF_FILE: f"an offset inside the file of {self.file_size} bytes",
            Code.L2_CUT_SHORT: f"a whole cluster inside the file of {self.file_size} bytes",
            Code.L1_OVER_METADATA: "a place past the header and the L1 table",
            Code.L2_OVER_METADATA: "a place apart from the header and all tables",
            Code.TABLE_OVERLAP: "a table that shares no cluster with another",
            Code.DUPLICATE_CLUSTER: "a cluster that no other entry refers to",
            Code.FREE_LIST_CONTRADICTED: "a cluster that the free list does not have",
        }[code]
