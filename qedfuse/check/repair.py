"""Repair: make the tables consistent again and keep as much of the guest's data as can be.

What is done for each kind of damage, and why:

- A cluster with several owners stays with the first; each other owner gets a copy, so
  that every guest offset goes on reading as it did.
- Two L1 entries with one table, or with tables that overlap: the same, with a copy of
  the table, whose clusters then are copied because they have an owner already.
- A cluster that is both a table and data: the table moves to a copy, the data stays.
  One of the two owners is wrong, and the tables cannot tell which.  Clearing the data's
  entry would lose the guest's data if it is the table's L1 entry that is wild, and so
  would mending that table in place.  The range is reported, since it may be the other
  way round.
- A table cut short by the end of the file keeps the entries that are there; a data
  cluster cut short is completed with zeros.
- An entry that points outside the file, between clusters or over the header or the L1
  table holds no data of the guest: it is cleared.
- Where there was an entry that is lost, an overlay gets zero clusters, for a lost L1
  entry a table of them: old data of the base would look as if it were right.
- What lies past the end of the disk is never copied, but cleared where it is in the way:
  a small disk could else be made to fill the host's.

What was lost is reported as ranges of the disk.  Leaks are left alone.  A list of free
clusters is dropped as soon as anything is changed, or if it is bad itself; what it listed
then counts as leaked, until a writable open scans the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qedfuse.check.checker import check_image
from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.findings import Code, RepairPlan
from qedfuse.check.lostranges import LostRanges
from qedfuse.check.outoffile import POISON_ENTRY, OutOfFileEntries
from qedfuse.check.rewrite import DryRunRewriter, Rewriter
from qedfuse.check.tables import EntryChanges, overlapping, read_l1_table, refuse_too_many_tables
from qedfuse.disk.space.l2tables import claim_tables
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED, ZERO

if TYPE_CHECKING:
    from qedfuse.check.findings import CheckReport, LostRange
    from qedfuse.check.rewrite import Save
    from qedfuse.check.tables import Indices
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header


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


async def repair_image(file: HostFile, header: Header) -> RepairReport:
    """Repair the tables of an image that is open for writing and locked.

    Crash-safe: NEED_CHECK is set first and cleared last, what points past the end of the
    file is given up before the file grows (see `qedfuse.check.outoffile`), and copies are
    durable before the entries that point to them.  A repair that was interrupted can be
    run again; it then no longer knows what the end of the file had cut off.  Without errors
    there is nothing to do but to clear NEED_CHECK and to drop a bad list of free clusters.
    Nothing is saved: `plan_repair` does that, before anything is changed.

    Args:
        file: The image.
        header: Its header.

    Raises:
        HostError: The host refused; NEED_CHECK stays set.
        NeedsCheckError: The file is too large to be checked in bounded memory.
    """
    sound = header.with_need_check(value=False)
    rewriter = Rewriter(file, header)
    # What cannot be checked is found out before anything is changed.
    before = await check_image(file, sound)
    if not before.table_errors:
        if before.errors or header.need_check:
            await rewriter.write_need_check(need_check=False)
            before = await check_image(file, sound.with_free_list(value=False))
        return RepairReport((), 0, 0, before)
    repair = _Repair(file, header, rewriter)
    await repair.run()
    after = await check_image(file, sound.with_free_list(value=False))
    if not after.errors:
        await rewriter.write_need_check(need_check=False)
    return RepairReport(
        tuple(repair.lost_ranges.ranges), repair.copied, repair.lost_ranges.cleared, after
    )


async def plan_repair(file: HostFile, header: Header, save: Save | None = None) -> RepairPlan:
    """Find out what `repair_image` would do to an image with errors; change nothing.

    Args:
        file: The image.
        header: Its header.
        save: Called for each piece that would be changed, with its file offset, its bytes
            as they are, and as they would be.  What lies past the end is no such piece.

    Raises:
        HostError: The host cannot read the file, or could not hold the repaired one.
        NeedsCheckError: The file is too large to be checked in bounded memory.
    """
    draft = DryRunRewriter(file, header, save)
    repair = _Repair(file, header, draft)
    await repair.run()
    lost, cleared = tuple(repair.lost_ranges.ranges), repair.lost_ranges.cleared
    return RepairPlan(lost, repair.copied, cleared, draft.written, draft.end)


class _Repair:
    """One repair under way."""

    def __init__(self, file: HostFile, header: Header, rewriter: Rewriter) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        self.rewriter = rewriter
        self._size = file.size()
        self._whole = rewriter.end
        self._classifier = EntryClassifier(header, self._whole)
        # Copies lie past the old end of the file, where nothing else can point to.
        self._references = OwnerBitmap(header.geometry.clusters(self._size), file.name)
        # L1 index, file offset, and where to read it: a draft has no copies.
        self._tables: list[tuple[int, int, int]] = []
        self._left = np.empty(0, np.uint64)  # where tables were that have moved, sorted
        self._l1_bad: list[int] = []
        self._l1_outside: dict[int, int] = {}
        self._l1_changes: dict[int, int] = {}
        # Zeros hide what the base has; without a base, nothing is as good.
        self._empty = ZERO if header.has_backing else UNALLOCATED
        self.lost_ranges = LostRanges(header.image_size)
        self.copied = 0

    async def run(self) -> None:
        """Repair; what points past the end goes first, then the file may become longer.

        New things become durable then, then L2 entries, then L1 entries.
        """
        await self.rewriter.write_need_check(need_check=True)
        indices, tables = await self._find_tables()
        move = await self._find_moves(tables)
        outside = OutOfFileEntries(self._file, self._classifier, self.rewriter, self.lost_ranges)
        places = zip(indices.tolist(), tables.tolist(), move.tolist(), strict=True)
        await outside.clear_all(self._l1_outside, sorted(places), self._empty)
        await self._complete_tables(indices, tables)
        await self.rewriter.extend(self._whole)
        await self._separate_tables(indices, tables, move)
        await self._replace_bad_tables()
        await self._claim_metadata()
        for index, table, source in self._tables:
            async for first, values in read_table(self._file, source, self._geometry.table_bytes):
                if (values > ZERO).any():
                    fixed = await self._repair_slice(index, first, values)
                    await self.rewriter.replace_entries(table + first * ENTRY_BYTES, values, fixed)
        await self._write_l1()

    def _beyond(self, index: int) -> bool:
        """Tell whether an L1 entry lies past the end of the disk."""
        return index >= self._geometry.l1_used(self._header.image_size)

    async def _find_tables(self) -> tuple[Indices, Values]:
        """Read the L1 table; give the entries that are good, sorted by their tables."""
        classifier = EntryClassifier(self._header, self._size)
        indices, tables = await read_l1_table(
            self._file, classifier, self._note_bad_tables, keep_short=True
        )
        order = np.lexsort((indices, tables))
        return indices[order], tables[order]

    def _note_bad_tables(self, code: Code, first: int, _values: Values, mask: Mask) -> None:
        """Note the L1 entries that are to be cleared; the L1 table is changed last."""
        span = self._geometry.table_span
        for place in np.flatnonzero(mask).tolist():
            refuse_too_many_tables(self._file, len(self._l1_bad) + 1)
            self._l1_bad.append(index := first + place)
            if code is Code.L1_OUT_OF_FILE:
                zeros = self._empty != UNALLOCATED and not self._beyond(index)
                self._l1_outside[index] = POISON_ENTRY if zeros else UNALLOCATED
            self.lost_ranges.add((first + place) * span, span, code)

    async def _complete_tables(self, indices: Indices, tables: Values) -> None:
        """Give the tables that run past the end of the file the rest of their entries.

        The entries are written, and durable, before the file gets any longer than they
        make it: an interrupted repair leaves a table that is still cut short, and not one
        in which the base shows, or one with an entry of which half has been there.
        """
        geometry = self._geometry
        # Half an entry is no entry.
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
        """Tell which tables cannot stay where they are, being something else as well."""
        shared = await overlapping(tables, self._geometry.table_bytes)
        self._classifier = self._classifier.with_tables(tables[~shared])
        under = await self._under_data(tables)
        self._left = self._classifier.tables[under]
        return (
            shared | under[np.searchsorted(self._classifier.tables, tables, "right") - 1] & ~shared
        )

    async def _separate_tables(self, indices: Indices, tables: Values, move: Mask) -> None:
        """Give each L1 entry a table that is nothing else, neither table nor data."""
        places = zip(indices.tolist(), tables.tolist(), move.tolist(), strict=True)
        for index, table, moves in places:
            if not moves:
                self._tables.append((index, table, table))
            elif self._beyond(index):
                self._l1_changes[index] = UNALLOCATED
                self.lost_ranges.cleared += 1
            else:
                copy = await self.rewriter.copy(table, self._geometry.table_bytes)
                self._tables.append((index, copy, copy if self.rewriter.changes_file else table))
                self._l1_changes[index] = copy
        self._tables.sort()
        moved = np.isin(self._classifier.tables, self._left)
        self._classifier = self._classifier.with_tables(self._classifier.tables[~moved])

    async def _under_data(self, tables: Values) -> Mask:
        """Tell over which of the layout's tables an entry of any table has its data."""
        under = np.zeros(len(self._classifier.tables), np.bool_)
        for table in np.unique(tables).tolist():
            async for _first, values in read_table(self._file, table, self._geometry.table_bytes):
                for code, mask in self._classifier.l2_errors(values):
                    if code is Code.L2_OVER_METADATA:
                        places = self._classifier.table_under(values[mask])
                        under[places[places >= 0]] = True
        return under

    async def _replace_bad_tables(self) -> None:
        """Decide what the L1 entries that are lost become."""
        geometry = self._geometry
        for index in self._l1_bad:
            self._l1_changes[index] = UNALLOCATED
            if self._empty != UNALLOCATED and not self._beyond(index):
                length = self._header.image_size - index * geometry.table_span
                count = geometry.clusters(min(length, geometry.table_span))
                self._l1_changes[index] = await self.rewriter.new_table(self._empty, count)

    async def _claim_metadata(self) -> None:
        """Mark what the header and the tables use that stay where they are."""
        bits = self._geometry.cluster_bits
        self._references.claim_range(0, self._header.header_end >> bits)
        l1_table = (self._header.l1_table_offset, self._header.l1_end)
        self._references.claim_range(l1_table[0] >> bits, l1_table[1] >> bits)
        await claim_tables(self._references, self._classifier.tables, self._geometry)

    async def _repair_slice(self, l1_index: int, first: int, values: Values) -> Values:
        """Work out what the entries of one slice should be, and copy what needs a copy."""
        size = self._geometry.cluster_size
        fixed = values.copy()
        start = l1_index * self._geometry.table_span + first * size
        good = values > ZERO
        for code, mask in self._classifier.l2_errors(values):
            good &= ~mask
            fixed[mask] = self._empty
            # What points past the end was noted when it was given up.
            for place in np.flatnonzero(mask).tolist() if code is not Code.L2_OUT_OF_FILE else ():
                self.lost_ranges.add(start + place * size, size, code)
        where = np.flatnonzero(good)
        taken = self._references.claim(values[where] >> np.uint64(self._geometry.cluster_bits))
        for place in where[taken].tolist():
            if start + place * size < self._header.image_size:
                fixed[place] = await self.rewriter.copy(int(values[place]), size)
                self.copied += 1
            else:
                fixed[place] = UNALLOCATED
                self.lost_ranges.cleared += 1
        self._report_doubts(start, values, good)
        return fixed

    def _report_doubts(self, start: int, values: Values, good: Mask) -> None:
        """Report data that the end of the file cut short, or that a table lay over."""
        geometry = self._geometry
        size = geometry.cluster_size
        if self._size != self._whole:
            cut = geometry.floor(self._size)
            for place in np.flatnonzero(good & (values == cut)).tolist():
                begin = start + place * size + self._size - cut
                self.lost_ranges.add(begin, self._whole - self._size, Code.L2_CUT_SHORT, cleared=0)
        over = self._classifier.with_tables(self._left).table_under(values) >= 0
        for place in np.flatnonzero(good & over).tolist():
            self.lost_ranges.add(start + place * size, size, Code.L2_OVER_METADATA, cleared=0)

    async def _write_l1(self) -> None:
        """Change the L1 table, now that all tables it will point to are right."""
        if not self._l1_changes:
            return
        changes = EntryChanges(self._l1_changes)
        start = self._header.l1_table_offset
        async for first, values in read_table(self._file, start, self._geometry.table_bytes):
            fixed = changes.applied(first, values)
            await self.rewriter.replace_entries(start + first * ENTRY_BYTES, values, fixed)
