"""Clearing table entries that point past the end of the file, before a repair extends the file.

A repair appends copies of tables and of data clusters to the file.  An entry that points past the
old end of the file would then become valid, and the guest would read a copy that belongs to another
entry.  So such entries are first overwritten and made durable, and only then does the file grow.

Most entries get their final value now: unallocated or, for an L2 entry of an overlay, a zero
cluster.  An L1 entry of an overlay for guest offsets inside the disk must not become unallocated,
because the guest would then read the backing file.  At the end of the repair, such an entry points
to a new table of zero clusters.  The new table needs a longer file, so the entry is `POISON_ENTRY`
until then.

A table that overlaps data or an earlier table must not be written to, so its entries cannot be
cleared.  The repair copies the table and corrects the copy.  Until the L1 entry points to the copy,
the guest reads through the original.  So the repair never allocates the clusters past the end to
which the original's entries point.  They are holes of the longer file, so the guest reads zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.check.findings import Code
from qedfuse.check.tables import EntryChanges
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.check.entryclassifier import EntryClassifier
    from qedfuse.check.lostranges import LostRanges
    from qedfuse.check.rewrite import Rewriter
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values

POISON_ENTRY: Final = 1
"""An L1 entry that is invalid for every length of the file: 1 is not a cluster boundary."""


class OutOfFileEntries:
    """The entries of one image that point past the end of its file."""

    def __init__(
        self,
        file: HostFile,
        classifier: EntryClassifier,
        rewriter: Rewriter,
        lost_ranges: LostRanges,
    ) -> None:
        """Prepare to clear entries; nothing is written yet.

        Args:
            file: The image.
            classifier: Classifies the entries by the file's length before the repair.
            rewriter: Writes to the image.
            lost_ranges: Records the ranges of the disk whose data is lost.
        """
        self._file = file
        self._classifier = classifier
        self._geometry = classifier.header.geometry
        self._rewriter = rewriter
        self._lost_ranges = lost_ranges

    async def clear_all(
        self,
        l1_entries: dict[int, int],
        tables: Iterable[tuple[int, int, bool]],
        cleared_value: int,
    ) -> None:
        """Clear the entries that point past the end of the file, durably; record lost data.

        Args:
            l1_entries: The new values, by index, of the L1 entries that point past the end of the
                file.  The caller must already have recorded the ranges that they lose.
            tables: For each table its L1 index, its file offset, and whether it overlaps data or an
                earlier table, and therefore must not be written to.
            cleared_value: The new value of cleared L2 entries.
        """
        # If several L1 entries point to the same table, all but the first get a copy of it, and the
        # first too if data overlaps the table (`moves`: gets a copy).  An L2 entry in this table
        # that points past the end loses data in the range of each of these L1 entries.  All losses
        # must be recorded before the L2 entry is cleared.  So the tables to copy are read first.
        avoided: list[Values] = [np.empty(0, np.uint64)]
        in_place: list[tuple[int, int]] = []
        length = self._geometry.table_bytes
        for index, table, moves in tables:
            if not moves:
                in_place.append((index, table))
                continue
            async for first, values in read_table(self._file, table, length):
                avoided.append(values[self._record_lost(index, first, values)])
        for index, table in in_place:
            async for first, values in read_table(self._file, table, length):
                lost = self._record_lost(index, first, values)
                await self._rewriter.clear_entries(
                    table + first * ENTRY_BYTES, values, np.where(lost, cleared_value, values)
                )
        avoided += await self._clear_l1_entries(l1_entries)
        self._rewriter.set_avoided(np.unique(np.concatenate(avoided)))
        await self._rewriter.sync_pending()

    def _record_lost(self, l1_index: int, first: int, values: Values) -> Mask:
        """Record the L2 entries of a slice that point past the file's end; return their mask."""
        lost = np.zeros(len(values), np.bool_)
        if len(values) and int(values.max()) >= self._classifier.file_size:
            for code, mask in self._classifier.l2_errors(values):
                if code is Code.L2_OUT_OF_FILE:
                    lost |= mask
            size = self._geometry.cluster_size
            start = l1_index * self._geometry.table_span + first * size
            for index in np.flatnonzero(lost).tolist():
                self._lost_ranges.add(start + index * size, size, Code.L2_OUT_OF_FILE)
        return lost

    async def _clear_l1_entries(self, l1_entries: dict[int, int]) -> list[Values]:
        """Overwrite entries of the L1 table; return the old values of those that get POISON_ENTRY.

        The caller must not allocate a table at one of the returned offsets.  Otherwise an entry
        could get its old value again.  The backup, with which the user can undo a repair, lacks the
        entries that have the same value before and after the repair.  So after an interruption it
        could not undo the `POISON_ENTRY` of such an entry.
        """
        poisoned: list[Values] = []
        if not l1_entries:
            return poisoned
        changes, l1_table = EntryChanges(l1_entries), self._classifier.header.l1_table_offset
        async for first, values in read_table(self._file, l1_table, self._geometry.table_bytes):
            fixed = changes.applied(first, values)
            poisoned.append(values[(fixed != values) & (fixed == POISON_ENTRY)])
            await self._rewriter.clear_entries(l1_table + first * ENTRY_BYTES, values, fixed)
        return poisoned
