"""The steps of a repair; `qedfuse.check.repair` describes what is done for each damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.findings import Code
from qedfuse.check.lostranges import LostRanges
from qedfuse.check.outoffile import POISON_ENTRY, OutOfFileEntries
from qedfuse.check.tables import EntryChanges, overlapping, read_l1_table, refuse_too_many_tables
from qedfuse.disk.space.l2tables import claim_tables
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED, ZERO

if TYPE_CHECKING:
    from qedfuse.check.rewrite import Rewriter
    from qedfuse.check.tables import Indices
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header


class TableRepair:
    """One repair of the tables of one image.

    Attributes:
        rewriter: What writes to the image.
        lost_ranges: The ranges of the disk that are lost so far.
        copied: Number of clusters that were copied so far.
    """

    def __init__(self, file: HostFile, header: Header, rewriter: Rewriter) -> None:
        """Prepare to repair ``file``, whose header is ``header``."""
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self.rewriter = rewriter
        self._size = file.size()
        self._whole_size = rewriter.end
        self._classifier = EntryClassifier(header, self._whole_size)
        # Covers the file as it was before the repair.  Past its end there are only copies,
        # and only entries that the repair writes point to those.
        self._owners = OwnerBitmap(header.geometry.clusters(self._size), file.name)
        # For each table its L1 index, its file offset, and the offset to read it at, which
        # is the old one in a dry run, where copies do not exist.
        self._tables: list[tuple[int, int, int]] = []
        # Old file offsets of the tables that move since they overlap data, ascending.
        self._moved_from = np.empty(0, np.uint64)
        self._bad_l1_indices: list[int] = []
        self._out_of_file_l1_entries: dict[int, int] = {}
        self._l1_changes: dict[int, int] = {}
        # A zero cluster hides the data of a backing file; without one, unallocated does.
        self._empty = ZERO if header.has_backing else UNALLOCATED
        self.lost_ranges = LostRanges(header.image_size)
        self.copied = 0

    async def run(self) -> None:
        """Repair the tables.

        Entries that point past the end of the file are cleared first; only then the file
        may grow.  After that copies and new tables become durable, then L2 entries, then
        L1 entries.
        """
        await self.rewriter.write_need_check(need_check=True)
        indices, tables = await self._find_tables()
        move = await self._find_moves(tables)
        out_of_file = OutOfFileEntries(
            self._file, self._classifier, self.rewriter, self.lost_ranges
        )
        owners = zip(indices.tolist(), tables.tolist(), move.tolist(), strict=True)
        await out_of_file.clear_all(self._out_of_file_l1_entries, sorted(owners), self._empty)
        await self._complete_tables(indices, tables)
        await self.rewriter.extend(self._whole_size)
        await self._separate_tables(indices, tables, move)
        await self._replace_bad_tables()
        await self._claim_metadata()
        for index, table, source in self._tables:
            async for first, values in read_table(self._file, source, self._geometry.table_bytes):
                if (values > ZERO).any():
                    fixed = await self._repair_slice(index, first, values)
                    await self.rewriter.replace_entries(table + first * ENTRY_BYTES, values, fixed)
        await self._write_l1()

    def _is_past_end(self, index: int) -> bool:
        """Return whether an L1 entry describes guest offsets past the end of the disk."""
        return index >= self._geometry.l1_used(self._header.image_size)

    async def _find_tables(self) -> tuple[Indices, Values]:
        """Read the L1 table; return its valid entries, sorted by the offsets of their tables."""
        classifier = EntryClassifier(self._header, self._size)
        indices, tables = await read_l1_table(
            self._file, classifier, self._record_bad_l1_entries, keep_short=True
        )
        order = np.lexsort((indices, tables))
        return indices[order], tables[order]

    def _record_bad_l1_entries(self, code: Code, first: int, _values: Values, mask: Mask) -> None:
        """Record the L1 entries that will be cleared; the L1 table is changed last."""
        span = self._geometry.table_span
        for at in np.flatnonzero(mask).tolist():
            refuse_too_many_tables(self._file, len(self._bad_l1_indices) + 1)
            self._bad_l1_indices.append(index := first + at)
            if code is Code.L1_OUT_OF_FILE:
                zeros = self._empty != UNALLOCATED and not self._is_past_end(index)
                self._out_of_file_l1_entries[index] = POISON_ENTRY if zeros else UNALLOCATED
            self.lost_ranges.add(index * span, span, code)

    async def _complete_tables(self, indices: Indices, tables: Values) -> None:
        """Complete the tables that the end of the file cuts short with empty entries.

        Until the entries are durable, the file grows only by them.  So an interrupted repair
        leaves a table that is still cut short, and never one through which the backing file
        shows, or one with half an old entry.
        """
        geometry = self._geometry
        # An entry of which only a part is in the file counts as missing.
        cut = self._size - self._size % ENTRY_BYTES
        short = tables + np.uint64(geometry.table_bytes) > self._size
        if not short.any():
            return
        for index, table in zip(indices[short].tolist(), tables[short].tolist(), strict=True):
            missing = max(0, cut - table) // ENTRY_BYTES * geometry.cluster_size
            start = index * geometry.table_span + missing
            self.lost_ranges.add(start, geometry.table_span - missing, Code.L1_CUT_SHORT, cleared=0)
        end = int(tables[-1]) + geometry.table_bytes
        if cut < self._size:
            old = bytes(await self._file.pread(cut, self._size - cut))
            half = self._empty.to_bytes(ENTRY_BYTES, "little")[: len(old)]
            await self.rewriter.overwrite(cut, old, half)
        await self.rewriter.fill(cut, (end - cut) // ENTRY_BYTES, self._empty)
        await self.rewriter.sync_pending()
        await self.rewriter.extend(end)

    async def _find_moves(self, tables: Values) -> Mask:
        """Return which tables must move, since they overlap another table or data."""
        shared = await overlapping(tables, self._geometry.table_bytes)
        self._classifier = self._classifier.with_tables(tables[~shared])
        under = await self._under_data(tables)
        self._moved_from = self._classifier.tables[under]
        return (
            shared | under[np.searchsorted(self._classifier.tables, tables, "right") - 1] & ~shared
        )

    async def _separate_tables(self, indices: Indices, tables: Values, move: Mask) -> None:
        """Give each L1 entry a table of its own, by copying those that must move."""
        owners = zip(indices.tolist(), tables.tolist(), move.tolist(), strict=True)
        for index, table, moves in owners:
            if not moves:
                self._tables.append((index, table, table))
            elif self._is_past_end(index):
                self._l1_changes[index] = UNALLOCATED
                self.lost_ranges.cleared += 1
            else:
                copy = await self.rewriter.copy(table, self._geometry.table_bytes)
                self._tables.append((index, copy, copy if self.rewriter.changes_file else table))
                self._l1_changes[index] = copy
        self._tables.sort()
        moved = np.isin(self._classifier.tables, self._moved_from)
        self._classifier = self._classifier.with_tables(self._classifier.tables[~moved])

    async def _under_data(self, tables: Values) -> Mask:
        """Return which of the classifier's tables overlap data that any table refers to."""
        under = np.zeros(len(self._classifier.tables), np.bool_)
        for table in np.unique(tables).tolist():
            async for _first, values in read_table(self._file, table, self._geometry.table_bytes):
                for code, mask in self._classifier.l2_errors(values):
                    if code is Code.L2_OVER_METADATA:
                        found = self._classifier.table_under(values[mask])
                        under[found[found >= 0]] = True
        return under

    async def _replace_bad_tables(self) -> None:
        """Choose the new values of the invalid L1 entries, and append the tables for them."""
        geometry = self._geometry
        for index in self._bad_l1_indices:
            self._l1_changes[index] = UNALLOCATED
            if self._empty != UNALLOCATED and not self._is_past_end(index):
                length = self._header.image_size - index * geometry.table_span
                count = geometry.clusters(min(length, geometry.table_span))
                self._l1_changes[index] = await self.rewriter.new_table(self._empty, count)

    async def _claim_metadata(self) -> None:
        """Mark the clusters of the header and of the tables that stay as owned."""
        bits = self._geometry.cluster_bits
        self._owners.claim_range(0, self._header.header_end >> bits)
        l1_table = (self._header.l1_table_offset, self._header.l1_end)
        self._owners.claim_range(l1_table[0] >> bits, l1_table[1] >> bits)
        await claim_tables(self._owners, self._classifier.tables, self._geometry)

    async def _repair_slice(self, l1_index: int, first: int, values: Values) -> Values:
        """Return the new entries of one slice, after copying clusters that have another owner."""
        size = self._geometry.cluster_size
        fixed = values.copy()
        start = l1_index * self._geometry.table_span + first * size
        good = values > ZERO
        for code, mask in self._classifier.l2_errors(values):
            good &= ~mask
            fixed[mask] = self._empty
            # Entries that point past the end were recorded when they were cleared.
            if code is not Code.L2_OUT_OF_FILE:
                for at in np.flatnonzero(mask).tolist():
                    self.lost_ranges.add(start + at * size, size, code)
        where = np.flatnonzero(good)
        taken = self._owners.claim(values[where] >> np.uint64(self._geometry.cluster_bits))
        for at in where[taken].tolist():
            if start + at * size < self._header.image_size:
                fixed[at] = await self.rewriter.copy(int(values[at]), size)
                self.copied += 1
            else:
                fixed[at] = UNALLOCATED
                self.lost_ranges.cleared += 1
        self._record_uncertain(start, values, good)
        return fixed

    def _record_uncertain(self, start: int, values: Values, good: Mask) -> None:
        """Record data that the end of the file cut short, or that a table overlapped."""
        geometry = self._geometry
        size = geometry.cluster_size
        if self._size != self._whole_size:
            cut = geometry.floor(self._size)
            for at in np.flatnonzero(good & (values == cut)).tolist():
                begin = start + at * size + self._size - cut
                self.lost_ranges.add(
                    begin, self._whole_size - self._size, Code.L2_CUT_SHORT, cleared=0
                )
        over = self._classifier.with_tables(self._moved_from).table_under(values) >= 0
        for at in np.flatnonzero(good & over).tolist():
            self.lost_ranges.add(start + at * size, size, Code.L2_OVER_METADATA, cleared=0)

    async def _write_l1(self) -> None:
        """Change the L1 table, after all tables that it will point to."""
        if not self._l1_changes:
            return
        changes = EntryChanges(self._l1_changes)
        start = self._header.l1_table_offset
        async for first, values in read_table(self._file, start, self._geometry.table_bytes):
            fixed = changes.applied(first, values)
            await self.rewriter.replace_entries(start + first * ENTRY_BYTES, values, fixed)
