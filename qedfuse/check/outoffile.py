"""Giving up what points past the end of the file, before a repair makes the file longer.

A repair puts copies at the end of the file.  An entry that points there would become
valid by that, and show the guest what is somebody else's, without a word: if the repair
is interrupted, the next one finds nothing wrong with the entry.  So the order is:

1. The entries that point past the end are overwritten.
2. A datasync.
3. Only then the file grows, by whatever the repair needs.

What they become is not for the next repair to guess at.  An L2 entry, and an L1 entry
where there is no base, is cleared at once, and nothing is left to be done.  An L1 entry of
an overlay becomes a table of zeros in the end, since the base would show through if it
were cleared.  The table takes a longer file; until it is there the entry is `POISON_ENTRY`.

A table that seems to be data as well must not be written to, since it may be data.  It
is going to be copied, and its copy is mended.  The original stays as it is, and in use until
the L1 entry names the copy; so here nothing is cleared, but the file grows around the
clusters that such entries name: in between these read as zeros, as they will in the end.
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
"""An L1 entry that is wrong however long the file gets."""


class OutOfFileEntries:
    """What points past the end of one file."""

    def __init__(
        self,
        file: HostFile,
        classifier: EntryClassifier,
        rewriter: Rewriter,
        lost_ranges: LostRanges,
    ) -> None:
        """Look at a file as it was before the repair; ``classifier`` has its length."""
        self._file = file
        self._classifier = classifier
        self._geometry = classifier.header.geometry
        self._rewriter = rewriter
        self._lost_ranges = lost_ranges

    async def clear_all(
        self, l1_entries: dict[int, int], tables: Iterable[tuple[int, int, bool]], empty: int
    ) -> None:
        """Make all of it harmless, durably, and note what is lost.

        Args:
            l1_entries: What the L1 entries are to be that point past the end, by index.
            tables: L1 index and file offset of each table, and whether it must not be
                changed because it is going to be copied.
            empty: What an L2 entry is to be.
        """
        # A table can be two of these: what is cleared in the one is lost in the other too,
        # and must have been seen there before.
        held: list[Values] = [np.empty(0, np.uint64)]
        kept: list[tuple[int, int]] = []
        length = self._geometry.table_bytes
        for index, table, moves in tables:
            if moves:
                async for first, values in read_table(
                    self._file, table, self._geometry.table_bytes
                ):
                    held.append(values[self._note_lost(index, first, values)])
            else:
                kept.append((index, table))
        for index, table in kept:
            async for first, values in read_table(self._file, table, length):
                lost = self._note_lost(index, first, values)
                await self._write_changed(table, first, values, np.where(lost, empty, values))
        held += await self._clear_l1_entries(l1_entries)
        self._rewriter.set_avoided(np.unique(np.concatenate(held)))
        await self._rewriter.sync_pending()

    def _note_lost(self, l1_index: int, first: int, values: Values) -> Mask:
        """Note the entries of a slice that point past the end, and tell which they are."""
        lost = np.zeros(len(values), np.bool_)
        if len(values) and int(values.max()) >= self._classifier.file_size:
            for code, mask in self._classifier.l2_errors(values):
                if code is Code.L2_OUT_OF_FILE:
                    lost |= mask
            size = self._geometry.cluster_size
            start = l1_index * self._geometry.table_span + first * size
            for place in np.flatnonzero(lost).tolist():
                self._lost_ranges.note(start + place * size, size, Code.L2_OUT_OF_FILE)
        return lost

    async def _clear_l1_entries(self, l1_entries: dict[int, int]) -> list[Values]:
        """Overwrite entries of the L1 table, and give those that get a new table later.

        That they are lost has been noted.  The new tables go elsewhere than where the
        entries point by chance: what is the same in the end would not be saved.
        """
        later: list[Values] = []
        if not l1_entries:
            return later
        changes, l1_table = EntryChanges(l1_entries), self._classifier.header.l1_table_offset
        async for first, values in read_table(self._file, l1_table, self._geometry.table_bytes):
            fixed = changes.applied(first, values)
            later.append(values[(fixed != values) & (fixed == POISON_ENTRY)])
            await self._write_changed(l1_table, first, values, fixed)
        return later

    async def _write_changed(self, table: int, first: int, old: Values, new: Values) -> None:
        """Write the entries of a slice that have changed, all at once."""
        where = np.flatnonzero(old != new)
        if len(where):
            begin, end = int(where[0]), int(where[-1]) + 1
            await self._rewriter.clear_entries(
                table + (first + begin) * ENTRY_BYTES, new[begin:end]
            )
