"""Completing the L2 tables that the end of the file cuts short, in a repair.

A table keeps the entries that are in the file, and its missing entries are appended.  In an overlay
they become zero clusters; if they were unallocated, the guest would read the backing file.

A table may overlap a data cluster that the end of the file cuts short as well.  Then the table
moves (`qedfuse.check.tablerepair`), and the data stays.  The table must nevertheless be completed
where it is, because the copy makes the file longer: after a crash, the original would have
unallocated entries.  When the L1 entry points to the copy, the data gets its old bytes back, and
zeros behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.check.findings import Code
from qedfuse.ondisk.constants import ENTRY_BYTES

if TYPE_CHECKING:
    from qedfuse.check.lostranges import LostRanges
    from qedfuse.check.rewrite import Rewriter
    from qedfuse.check.tables import Indices
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Values
    from qedfuse.ondisk.geometry import Geometry


class ShortTables:
    """The tables of one image that the end of its file cuts short."""

    def __init__(
        self, file: HostFile, geometry: Geometry, rewriter: Rewriter, lost_ranges: LostRanges
    ) -> None:
        """Prepare to complete tables; nothing is written yet.

        Args:
            file: The image.  It must still have its length from before the repair.
            geometry: The sizes of its clusters and tables.
            rewriter: Writes to the image.
            lost_ranges: Records the ranges of the disk whose data is lost.
        """
        self._file = file
        self._geometry = geometry
        self._rewriter = rewriter
        self._lost_ranges = lost_ranges
        self._size = file.size()
        # File offset from which on entries are missing.  An entry of which only a part is in the
        # file counts as missing.
        self._entries_end = self._size - self._size % ENTRY_BYTES
        # The bytes of the incomplete entry; None as long as no table was completed.
        self._old_bytes: bytes | None = None

    async def complete(self, indices: Indices, tables: Values, value: int) -> None:
        """Append the missing entries of the tables; record the ranges that they describe as lost.

        Until the new entries are durable, the file grows only by writing them.  So after a crash
        every entry that is in the file has been written.  If the file were extended first, entries
        that are not yet written would be unallocated.

        Args:
            indices: The L1 indices of all tables.
            tables: Their file offsets, ascending.
            value: The value of the new entries.
        """
        geometry, entries_end = self._geometry, self._entries_end
        short = tables + geometry.table_bytes > self._size
        if not short.any():
            return
        for index, table in zip(indices[short].tolist(), tables[short].tolist(), strict=True):
            # Number of bytes of the disk that the entries in the file describe.
            kept_bytes = max(0, entries_end - table) // ENTRY_BYTES * geometry.cluster_size
            start = index * geometry.table_span + kept_bytes
            self._lost_ranges.add(
                start, geometry.table_span - kept_bytes, Code.L1_CUT_SHORT, cleared_entries=0
            )
        end = int(tables[-1]) + geometry.table_bytes
        self._old_bytes = bytes(await self._file.pread(entries_end, self._size - entries_end))
        if self._old_bytes:
            # The part of an entry that is in the file is written by `overwrite`.  `fill` cannot do
            # this: it does not write the value 0, and saves no old bytes for a backup.
            new = value.to_bytes(ENTRY_BYTES, "little")[: len(self._old_bytes)]
            await self._rewriter.overwrite(entries_end, self._old_bytes, new)
            # The new bytes must be durable before the file becomes longer.  Otherwise a power
            # failure could leave an entry of the old bytes and zeros, which may be the offset of
            # other data.
            await self._rewriter.sync_pending()
        await self._rewriter.fill(entries_end, (end - entries_end) // ENTRY_BYTES, value)
        await self._rewriter.sync_pending()
        await self._rewriter.extend(end)

    def changed_data(self, tables_that_stay: Values) -> bool:
        """Return whether `complete` may have changed a data cluster, which `restore_data` corrects.

        It has changed none if a table that does not move covers the last cluster of the old file.

        Args:
            tables_that_stay: The file offsets of the tables that do not move.
        """
        if self._old_bytes is None or self._size == self._geometry.ceil(self._size):
            return False
        ends = tables_that_stay + self._geometry.table_bytes
        covers = (tables_that_stay <= self._size) & (ends > self._size)
        return not covers.any()

    async def restore_data(self) -> None:
        """Write the old end of the last data cluster again, with zeros up to the cluster's end.

        All earlier writes are made durable first: the L1 entries of the tables that `complete` has
        written there must already point to copies.  A crash before this call can cost up to 7 bytes
        of that data, and its end is then not zeros.
        """
        zeros = bytes(self._geometry.ceil(self._size) - self._size)
        await self._rewriter.overwrite(self._entries_end, b"", (self._old_bytes or b"") + zeros)
