"""Clearing the entries that point past the end of the file, before a repair extends the file.

A repair appends copies to the file.  An entry that points past the old end would thereby
become valid, and silently show the guest the bytes of another cluster.  If the repair is
interrupted then, the next one finds nothing wrong with that entry.  So the order is:

1. The entries that point past the end are overwritten.
2. A datasync.
3. Only then the file grows, by whatever the repair needs.

Most entries get their final value in step 1: an L2 entry is cleared, and so is an L1 entry
of an image without a backing file.  An L1 entry of an overlay must not be cleared, because
the backing file would show through; in the end it points to a new table of zero clusters.
That table needs a longer file, so in step 1 the entry becomes `POISON_ENTRY`.

A table that overlaps data must not be written to, since its bytes may be data.  It will be
copied, and the repair corrects the copy.  Until the L1 entry points to the copy, the
original stays unchanged and in use.  So its entries cannot be cleared.  Instead the repair
never allocates the clusters that they point to.  Once the file has grown past those
clusters, they are holes and read as zeros, like the entries of the corrected copy.
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
"""An L1 entry that is invalid whatever the length of the file."""


class OutOfFileEntries:
    """The entries of one image that point past the end of its file."""

    def __init__(
        self,
        file: HostFile,
        classifier: EntryClassifier,
        rewriter: Rewriter,
        lost_ranges: LostRanges,
    ) -> None:
        """Prepare to clear entries; ``classifier`` has the file's length before the repair."""
        self._file = file
        self._classifier = classifier
        self._geometry = classifier.header.geometry
        self._rewriter = rewriter
        self._lost_ranges = lost_ranges

    async def clear_all(
        self, l1_entries: dict[int, int], tables: Iterable[tuple[int, int, bool]], empty: int
    ) -> None:
        """Clear all entries that point past the end, durably, and record what is lost.

        Args:
            l1_entries: The new values of the L1 entries that point past the end, by index.
            tables: For each table its L1 index, its file offset, and whether it must stay
                unchanged because it will be copied.
            empty: The new value of L2 entries.
        """
        # Two L1 entries can name the same table.  An entry that is cleared is lost for both,
        # so the tables that will be copied are read before any entry is cleared.
        clusters_in_use: list[Values] = [np.empty(0, np.uint64)]
        in_place: list[tuple[int, int]] = []
        length = self._geometry.table_bytes
        for index, table, moves in tables:
            if not moves:
                in_place.append((index, table))
                continue
            async for first, values in read_table(self._file, table, length):
                clusters_in_use.append(values[self._record_lost(index, first, values)])
        for index, table in in_place:
            async for first, values in read_table(self._file, table, length):
                lost = self._record_lost(index, first, values)
                await self._write_changed(table, first, values, np.where(lost, empty, values))
        clusters_in_use += await self._clear_l1_entries(l1_entries)
        self._rewriter.set_avoided(np.unique(np.concatenate(clusters_in_use)))
        await self._rewriter.sync_pending()

    def _record_lost(self, l1_index: int, first: int, values: Values) -> Mask:
        """Record the entries of a slice that point past the end; return which they are."""
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
        """Overwrite entries of the L1 table; return the old values of the poisoned ones.

        The caller has recorded what is lost.  A new table must not be allocated at the offset
        that its L1 entry had: the entry would be the same before and after the repair, so
        the backup would not have it.
        """
        poisoned: list[Values] = []
        if not l1_entries:
            return poisoned
        changes, l1_table = EntryChanges(l1_entries), self._classifier.header.l1_table_offset
        async for first, values in read_table(self._file, l1_table, self._geometry.table_bytes):
            fixed = changes.applied(first, values)
            poisoned.append(values[(fixed != values) & (fixed == POISON_ENTRY)])
            await self._write_changed(l1_table, first, values, fixed)
        return poisoned

    async def _write_changed(self, table: int, first: int, old: Values, new: Values) -> None:
        """Write the changed entries of a slice, whose first entry has index ``first``."""
        where = np.flatnonzero(old != new)
        if len(where):
            begin, end = int(where[0]), int(where[-1]) + 1
            offset = table + (first + begin) * ENTRY_BYTES
            await self._rewriter.clear_entries(offset, new[begin:end])
