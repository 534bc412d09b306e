"""Clearing the entries that point past the end of the file, before a repair extends the file.

A repair appends copies of tables and of data clusters to the file.  An entry that points past the
old end of the file would then become valid, and the guest would read a copy that belongs to another
entry.  If the repair were interrupted after the file has grown, the next check would find the entry
valid.  So the order is:

1. The entries that point past the end are overwritten.
2. A datasync makes the overwritten entries durable.
3. Only after the datasync does the file grow.

Most entries get their final value in step 1.  An L2 entry becomes unallocated or, in an overlay (an
image with a backing file), a zero cluster.  An L1 entry becomes unallocated if the image has no
backing file, or if the entry is for guest offsets past the end of the disk.  Any other L1 entry of
an overlay must not become unallocated, because the guest would then read the backing file.  At the
end of the repair, such an entry points to a new table of zero clusters.  The new table needs a
longer file, so in step 1 the entry becomes `POISON_ENTRY`.

A table that overlaps data, or another table before it in the file, must not be written to, because
its bytes may be that data or part of the other table.  The repair copies the table and corrects the
copy.  Until the L1 entry points to the copy, the original table is in use, and its entries that
point past the end of the file cannot be cleared.  Instead the repair never allocates the clusters
to which these entries point.  When the file has grown past those clusters, they are holes.  So the
guest reads zeros through the original table, as through the corrected copy.
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
"""An L1 entry that is invalid for every length of the file, because 1 is not a multiple of the
cluster size."""


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
            classifier: Classifies the entries by the file's length before the repair, rounded up
                to a whole cluster.
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
        """Clear the entries that point past the end of the file, durably; record lost L2 entries.

        A table moves if it overlaps data or an earlier table.  The entries of such tables are not
        cleared.  Instead the repair will not allocate the clusters to which these entries point.

        Args:
            l1_entries: The new values, by index, of the L1 entries that point past the end of the
                file.  The caller must already have recorded the ranges that are lost because of
                these L1 entries.
            tables: For each table its L1 index, its file offset, and whether the table moves and
                therefore must not be written to.
            cleared_value: The new value of cleared L2 entries.
        """
        # If several L1 entries point to the same table, the table moves for all of them, or for all
        # but one.  An L2 entry of the table that points past the end of the file loses data in the
        # range of each of these L1 entries.  All these losses must be recorded before the L2 entry
        # is cleared.  So the tables of L1 entries that get a moved copy are read first.
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
        """Record the L2 entries of a slice that point past the file's end; return a mask of them.

        Args:
            l1_index: The L1 index of the table.
            first: Index, in the table, of the first entry of the slice.
            values: The entries of the slice.
        """
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

        The caller must not allocate a table at one of the returned offsets.  Otherwise
        an entry could get a new table at its own old offset.  The backup has only bytes that differ
        before and after the repair, so it would lack this entry.  But an interrupted repair leaves
        `POISON_ENTRY` in the entry, and the old value could not be restored.
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
