"""The steps of a repair; `qedfuse.check.repair` says how each kind of damage is repaired."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.findings import Code
from qedfuse.check.lostranges import LostRanges
from qedfuse.check.outoffile import POISON_ENTRY, OutOfFileEntries
from qedfuse.check.shorttables import ShortTables
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
        rewriter: Writes to the image, or only counts the writes in a dry run.
        lost_ranges: The ranges of the disk whose data is lost or possibly wrong, as found so far.
        copied: Number of data clusters that were copied so far.
    """

    def __init__(self, file: HostFile, header: Header, rewriter: Rewriter) -> None:
        """Prepare to repair ``file``, whose header is ``header``."""
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self.rewriter = rewriter
        # The length of the file before the repair: exact, and rounded up to a whole cluster.
        self._size = file.size()
        self._rounded_size = rewriter.end
        self._classifier = EntryClassifier(header, self._rounded_size)
        # Clusters past the old end of the file need no bit: they are copies and new tables, and
        # exactly one entry refers to each.
        self._owners = OwnerBitmap(header.geometry.clusters(self._size), file.name)
        # For each table its L1 index, its file offset after the repair, and the file offset at
        # which it is read: in a dry run the old one, because nothing is copied.
        self._tables: list[tuple[int, int, int]] = []
        # Old file offsets of the tables that move because they overlap data, ascending.
        self._tables_over_data = np.empty(0, np.uint64)
        self._bad_l1_indices: list[int] = []
        # New values, by L1 index, of the L1 entries that point past the end of the file.
        self._out_of_file_l1_entries: dict[int, int] = {}
        # Final values, by L1 index, of all L1 entries that change.
        self._l1_changes: dict[int, int] = {}
        # The new value of a lost L2 entry.  In an overlay it is not unallocated, because the guest
        # would read the backing file through the entry.
        self._cleared_value = ZERO if header.has_backing else UNALLOCATED
        self.lost_ranges = LostRanges(header.image_size)
        self.copied = 0

    async def run(self) -> None:
        """Set NEED_CHECK and repair the tables; NEED_CHECK stays set.

        Entries that point past the end of the file are cleared or made harmless before the file
        grows (`OutOfFileEntries`).  After that, copies and new tables become durable before the L2
        entries change, and the L2 entries become durable before the L1 entries change.

        Raises:
            HostError: The host refused an access, or the file would become too long.
            NeedsCheckError: The file is too large, or has too many tables or invalid L1 entries.
        """
        await self.rewriter.write_need_check(need_check=True)
        indices, tables = await self._find_tables()
        must_move = await self._find_moves(tables)
        out_of_file = OutOfFileEntries(
            self._file, self._classifier, self.rewriter, self.lost_ranges
        )
        table_moves = zip(indices.tolist(), tables.tolist(), must_move.tolist(), strict=True)
        await out_of_file.clear_all(
            self._out_of_file_l1_entries, sorted(table_moves), self._cleared_value
        )
        short_tables = ShortTables(self._file, self._geometry, self.rewriter, self.lost_ranges)
        await short_tables.complete(indices, tables, self._cleared_value)
        await self.rewriter.extend(self._rounded_size)
        await self._separate_tables(indices, tables, must_move)
        if self.rewriter.changes_file and short_tables.changed_data(self._classifier.tables):
            await self._write_l1()
            await short_tables.restore_data()
        await self._replace_bad_tables()
        await self._claim_metadata()
        for index, table, source in self._tables:
            async for first, values in read_table(self._file, source, self._geometry.table_bytes):
                if (values > ZERO).any():
                    fixed = await self._repair_slice(index, first, values)
                    await self.rewriter.replace_entries(table + first * ENTRY_BYTES, values, fixed)
        await self._write_l1()

    def _is_past_end(self, index: int) -> bool:
        """Return whether L1 entry ``index`` describes guest offsets past the end of the disk."""
        return index >= self._geometry.l1_used(self._header.image_size)

    async def _find_tables(self) -> tuple[Indices, Values]:
        """Return the valid L1 entries as indices and values, sorted by value; record the others.

        An entry is valid here even if the end of the file cuts its table short.
        """
        classifier = EntryClassifier(self._header, self._size)
        indices, tables = await read_l1_table(
            self._file, classifier, self._record_bad_l1_entries, keep_short=True
        )
        order = np.lexsort((indices, tables))
        return indices[order], tables[order]

    def _record_bad_l1_entries(self, code: Code, first: int, _values: Values, mask: Mask) -> None:
        """Record the L1 entries of ``mask`` as invalid, and the ranges that are lost with them.

        ``first`` is the L1 index of the first entry in ``mask``.

        Raises:
            NeedsCheckError: There are too many invalid entries.
        """
        span = self._geometry.table_span
        for at in np.flatnonzero(mask).tolist():
            refuse_too_many_tables(self._file, len(self._bad_l1_indices) + 1)
            self._bad_l1_indices.append(index := first + at)
            if code is Code.L1_OUT_OF_FILE:
                # An entry that will point to a new table stays invalid until the table is durable.
                needs_table = self._cleared_value != UNALLOCATED and not self._is_past_end(index)
                self._out_of_file_l1_entries[index] = POISON_ENTRY if needs_table else UNALLOCATED
            self.lost_ranges.add(index * span, span, code)

    async def _find_moves(self, tables: Values) -> Mask:
        """Return a mask of the tables that must move, because they overlap a table or data.

        Of two tables that overlap, the later one moves: the one at the higher file offset or, at
        the same offset, with the higher L1 index.

        Afterwards `_tables_over_data` has the offsets of the tables that move because of data, and
        `_classifier` has all tables except those that overlap an earlier table.
        """
        overlaps_earlier = await overlapping(tables, self._geometry.table_bytes)
        self._classifier = self._classifier.with_tables(tables[~overlaps_earlier])
        overlaps_data = await self._overlapped_by_data(tables)
        self._tables_over_data = self._classifier.tables[overlaps_data]
        # `overlaps_data` lacks the tables that overlap an earlier table; these move in any case.
        positions = np.searchsorted(self._classifier.tables, tables, "right") - 1
        return overlaps_earlier | overlaps_data[positions]

    async def _separate_tables(self, indices: Indices, tables: Values, must_move: Mask) -> None:
        """Copy the tables that must move, so that no table overlaps another table or data.

        A table past the end of the disk is not copied: its L1 entry is cleared.  Afterwards
        `_classifier` has only the tables that do not move.
        """
        table_moves = zip(indices.tolist(), tables.tolist(), must_move.tolist(), strict=True)
        for index, table, moves in table_moves:
            if not moves:
                self._tables.append((index, table, table))
            elif self._is_past_end(index):
                self._l1_changes[index] = UNALLOCATED
                self.lost_ranges.cleared_entries += 1
            else:
                copy = await self.rewriter.copy(table, self._geometry.table_bytes)
                self._tables.append((index, copy, copy if self.rewriter.changes_file else table))
                self._l1_changes[index] = copy
        self._tables.sort()
        moved = np.isin(self._classifier.tables, self._tables_over_data)
        self._classifier = self._classifier.with_tables(self._classifier.tables[~moved])

    async def _overlapped_by_data(self, tables: Values) -> Mask:
        """Return for each table in `_classifier.tables` whether a data cluster overlaps it.

        The data clusters are those to which the tables at the file offsets ``tables`` point.
        """
        overlaps_data = np.zeros(len(self._classifier.tables), np.bool_)
        for table in np.unique(tables).tolist():
            async for _first, values in read_table(self._file, table, self._geometry.table_bytes):
                for code, mask in self._classifier.l2_errors(values):
                    if code is Code.L2_OVER_METADATA:
                        table_indices = self._classifier.table_containing(values[mask])
                        overlaps_data[table_indices[table_indices >= 0]] = True
        return overlaps_data

    async def _replace_bad_tables(self) -> None:
        """Choose the new values of the invalid L1 entries, and append the new tables.

        In an overlay, an entry for guest offsets inside the disk gets a new table of zero clusters.
        All other entries become unallocated.
        """
        geometry = self._geometry
        for index in self._bad_l1_indices:
            self._l1_changes[index] = UNALLOCATED
            if self._cleared_value != UNALLOCATED and not self._is_past_end(index):
                length = self._header.image_size - index * geometry.table_span
                count = geometry.clusters(min(length, geometry.table_span))
                self._l1_changes[index] = await self.rewriter.new_table(self._cleared_value, count)

    async def _claim_metadata(self) -> None:
        """Mark the header, the L1 table and the L2 tables that do not move as owned."""
        bits = self._geometry.cluster_bits
        self._owners.claim_range(0, self._header.header_end >> bits)
        l1_table = (self._header.l1_table_offset, self._header.l1_end)
        self._owners.claim_range(l1_table[0] >> bits, l1_table[1] >> bits)
        await claim_tables(self._owners, self._classifier.tables, self._geometry)

    async def _repair_slice(self, l1_index: int, first: int, values: Values) -> Values:
        """Return the new entries of one slice, after making the copies to which they point.

        An invalid entry gets the value `_cleared_value`.  If the cluster of a valid entry already
        has an owner, the entry gets a copy, or becomes unallocated if it lies past the end of the
        disk.

        Args:
            l1_index: The L1 index of the table.
            first: Index, in the table, of the first entry of the slice.
            values: The entries of the slice.
        """
        size = self._geometry.cluster_size
        fixed = values.copy()
        start = l1_index * self._geometry.table_span + first * size
        valid = values > ZERO
        for code, mask in self._classifier.l2_errors(values):
            valid &= ~mask
            fixed[mask] = self._cleared_value
            # `OutOfFileEntries` has already recorded entries that point past the file's end.
            if code is not Code.L2_OUT_OF_FILE:
                for at in np.flatnonzero(mask).tolist():
                    self.lost_ranges.add(start + at * size, size, code)
        where = np.flatnonzero(valid)
        had_owner = self._owners.claim(values[where] >> np.uint64(self._geometry.cluster_bits))
        for at in where[had_owner].tolist():
            if start + at * size < self._header.image_size:
                fixed[at] = await self.rewriter.copy(int(values[at]), size)
                self.copied += 1
            else:
                fixed[at] = UNALLOCATED
                self.lost_ranges.cleared_entries += 1
        self._record_uncertain(start, values, valid)
        return fixed

    def _record_uncertain(self, start: int, values: Values, valid: Mask) -> None:
        """Record data that the end of the file cut short, or that a table overlapped.

        ``start`` is the guest offset of the first entry.  ``values`` are the entries before the
        repair.
        """
        geometry = self._geometry
        size = geometry.cluster_size
        if self._size != self._rounded_size:
            cut_cluster = geometry.floor(self._size)
            for at in np.flatnonzero(valid & (values == cut_cluster)).tolist():
                begin = start + at * size + self._size - cut_cluster
                self.lost_ranges.add(
                    begin, self._rounded_size - self._size, Code.L2_CUT_SHORT, cleared_entries=0
                )
        over_data = self._classifier.with_tables(self._tables_over_data)
        overlapped = over_data.table_containing(values) >= 0
        for at in np.flatnonzero(valid & overlapped).tolist():
            self.lost_ranges.add(start + at * size, size, Code.L2_OVER_METADATA, cleared_entries=0)

    async def _write_l1(self) -> None:
        """Change the L1 table, after making durable all tables to which it will point."""
        if not self._l1_changes:
            return
        changes = EntryChanges(self._l1_changes)
        start = self._header.l1_table_offset
        async for first, values in read_table(self._file, start, self._geometry.table_bytes):
            fixed = changes.applied(first, values)
            await self.rewriter.replace_entries(start + first * ENTRY_BYTES, values, fixed)
