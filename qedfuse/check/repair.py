"""Repair: make the tables consistent again and keep as much of the guest's data as can be.

What is done for each kind of damage, and why:

- A cluster with several owners stays with the first; each other owner gets a copy, so
  that every guest offset goes on reading as it did.
- Two L1 entries with one table, or with tables that overlap: the same, with a copy of
  the table, whose clusters then are copied because they have an owner already.
- A cluster or a table cut short by the end of the file is completed with zeros.
- An entry that points outside the file, between clusters or over metadata holds no data
  of the guest: it is cleared.  In an overlay it becomes a zero cluster, because old data
  of the base in place of what was lost would look as if it were right.

What was lost is reported as ranges of the disk.  Leaks are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.check.entries import Layout, read_table
from qedfuse.check.findings import CheckReport, Code
from qedfuse.check.references import References
from qedfuse.check.walk import check_image
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED, ZERO
from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class LostRange:
    """A range of the disk, in bytes, whose content is gone; it reads as zeros now."""

    start: int
    length: int
    code: Code


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The outcome of a repair.

    Attributes:
        lost: What had to be given up, in the order in which it was found.
        copied: Clusters that got a copy of their own.
        cleared: Entries that were cleared.
        after: A check of the image as it is now.
    """

    lost: tuple[LostRange, ...]
    copied: int
    cleared: int
    after: CheckReport


async def repair_image(
    file: HostFile, header: Header, backup: Callable[[int, bytes], None] | None = None
) -> RepairReport:
    """Repair the tables of an image that is open for writing and locked.

    Crash-safe: NEED_CHECK is set first and cleared last, copies are durable before the
    entries that point to them.  A repair that was interrupted can be run again.

    Args:
        file: The image.
        header: Its header.
        backup: Called with the file offset and the old bytes before any part of a
            table is changed.

    Raises:
        HostError: The host refused; NEED_CHECK stays set.
        NeedsCheckError: The file is too large to be checked in bounded memory.
    """
    repair = _Repair(file, header, backup)
    await repair.mark(need_check=True)
    await repair.repair_l1()
    await repair.repair_l2()
    await repair.write_l1()
    after = await check_image(file, header)
    if not after.errors:
        await repair.mark(need_check=False)
    return RepairReport(tuple(repair.lost), repair.copied, repair.cleared, after)


class _Repair:
    """One repair under way."""

    def __init__(
        self, file: HostFile, header: Header, backup: Callable[[int, bytes], None] | None
    ) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self._backup = backup or (lambda _offset, _old: None)
        self._size = file.size()
        self._whole = self._end = header.geometry.ceil(self._size)
        self._layout = Layout(header, self._whole, np.empty(0, np.uint64))
        self._references = References(header.geometry.clusters(self._size), file.name)
        self._tables: list[tuple[int, int]] = []
        self._l1_changes: list[tuple[int, int]] = []  # (L1 index, new value)
        # Zeros hide what the base has; without a base, nothing is as good.
        self._empty = ZERO if header.has_backing else UNALLOCATED
        self.lost: list[LostRange] = []
        self.copied = 0
        self.cleared = 0

    async def mark(self, *, need_check: bool) -> None:
        """Set or clear NEED_CHECK, durably, after everything before is durable."""
        await self._file.datasync()
        header = self._header.with_need_check(value=need_check).without_stale_autoclear()
        await self._file.pwrite(0, build_header(header))
        await self._file.datasync()

    async def repair_l1(self) -> None:
        """Sort out the L1 entries; the L1 table itself is changed last, by `write_l1`."""
        span = self._geometry.table_span
        found: list[tuple[int, int]] = []
        start = self._header.l1_table_offset
        layout = Layout(self._header, self._size, self._layout.tables)
        async for first, values in read_table(self._file, self._header, start):
            good = values != UNALLOCATED
            for code, mask in layout.judge_tables(values):
                for place in np.flatnonzero(mask):
                    index = first + int(place)
                    if code is Code.L1_CUT_SHORT:
                        self._complete_table(index, int(values[place]))
                    else:
                        good[place] = False
                        self._l1_changes.append((index, UNALLOCATED))
                        self._lose(index * span, span, code)
            found += [(first + int(p), int(values[p])) for p in np.flatnonzero(good)]
        if self._size != self._whole:
            await self._file.truncate(self._whole)
            await self._file.datasync()
        await self._separate_tables(found)
        offsets = sorted(table for _index, table in self._tables)
        self._layout.tables = np.array(offsets, np.uint64)
        bits = self._geometry.cluster_bits
        size = self._geometry.clusters(self._size)
        # Copies lie past the old end of the file, where nothing else can point to.
        for begin, end in (
            (0, self._header.header_end),
            (self._header.l1_table_offset, self._header.l1_end),
            *((table, table + self._geometry.table_bytes) for table in offsets),
        ):
            self._references.claim_range(min(begin >> bits, size), min(end >> bits, size))

    def _complete_table(self, index: int, table: int) -> None:
        """Have a table completed of which the file holds a part; the rest of it is lost."""
        self._whole = self._end = max(self._whole, table + self._geometry.table_bytes)
        self._layout.file_size = self._whole
        begin = (self._size - table) // ENTRY_BYTES * self._geometry.cluster_size
        span = self._geometry.table_span
        self._lose(index * span + begin, span - begin, Code.L1_CUT_SHORT, cleared=0)

    async def _separate_tables(self, found: list[tuple[int, int]]) -> None:
        """Give each L1 entry a table that it shares with nobody."""
        end = -1
        for index, table in sorted(found, key=lambda item: (item[1], item[0])):
            if table >= end:
                end = table + self._geometry.table_bytes
                self._tables.append((index, table))
            else:
                copy = await self._copy(table, self._geometry.table_bytes)
                self._tables.append((index, copy))
                self._l1_changes.append((index, copy))
        self._tables.sort()

    async def repair_l2(self) -> None:
        """Sort out the entries of all L2 tables."""
        for l1_index, table in self._tables:
            async for first, values in read_table(self._file, self._header, table):
                if (values > ZERO).any():
                    fixed = await self._repair_slice(l1_index, first, values)
                    await self._replace(table + first * ENTRY_BYTES, values, fixed)

    async def _repair_slice(
        self, l1_index: int, first: int, values: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """Work out what the entries of one slice should be, and copy what needs a copy."""
        geometry = self._geometry
        fixed = values.copy()
        start = l1_index * geometry.table_span + first * geometry.cluster_size
        good = values > ZERO
        for code, mask in self._layout.judge_clusters(values):
            good &= ~mask
            for place in np.flatnonzero(mask):
                fixed[place] = self._empty
                self._lose(start + int(place) * geometry.cluster_size, geometry.cluster_size, code)
        where = np.flatnonzero(good)
        taken = self._references.claim(values[where] >> np.uint64(geometry.cluster_bits))
        for place in where[taken]:
            fixed[place] = await self._copy(int(values[place]), geometry.cluster_size)
            self.copied += 1
        if self._size != self._whole:
            cut = geometry.floor(self._size)
            for place in np.flatnonzero(values == cut):
                begin = start + int(place) * geometry.cluster_size + self._size - cut
                self._lose(begin, self._whole - self._size, Code.L2_CUT_SHORT, cleared=0)
        return fixed

    async def _replace(self, offset: int, old: NDArray[np.uint64], new: NDArray[np.uint64]) -> None:
        """Write the entries that have changed, once what they point to is durable."""
        where = np.flatnonzero(old != new)
        if len(where):
            begin, end = int(where[0]), int(where[-1]) + 1
            self._backup(offset + begin * ENTRY_BYTES, _bytes(old[begin:end]))
            await self._file.datasync()
            await self._file.pwrite(offset + begin * ENTRY_BYTES, _bytes(new[begin:end]))

    async def write_l1(self) -> None:
        """Change the L1 table, now that all tables it will point to are right."""
        if self._l1_changes:
            await self._file.datasync()
        for index, value in self._l1_changes:
            offset = self._header.l1_table_offset + index * ENTRY_BYTES
            self._backup(offset, bytes(await self._file.pread(offset, ENTRY_BYTES)))
            await self._file.pwrite(offset, value.to_bytes(ENTRY_BYTES, "little"))

    async def _copy(self, start: int, length: int) -> int:
        """Copy a range of the file to its end; give the file offset of the copy."""
        target = self._end
        self._end += length
        await self._file.truncate(self._end)
        for at in range(0, length, _COPY_BYTES):
            data = await self._file.pread(start + at, min(_COPY_BYTES, length - at))
            await self._file.pwrite(target + at, data)
        return target

    def _lose(self, start: int, length: int, code: Code, cleared: int = 1) -> None:
        """Note a range of the disk that had to be given up; neighbours are joined."""
        self.cleared += cleared
        length = max(0, min(length, self._header.image_size - start))
        last = self.lost[-1] if self.lost else None
        if last is not None and last.code is code and last.start + last.length == start:
            self.lost[-1] = LostRange(last.start, last.length + length, code)
        elif length:
            self.lost.append(LostRange(start, length, code))


def _bytes(values: NDArray[np.uint64]) -> bytes:
    """Encode entries as they stand in the file."""
    return values.astype("<u8").tobytes()
