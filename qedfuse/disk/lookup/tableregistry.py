"""Where the L2 tables of an image lie, and where the entries of its tables may point.

A data cluster must not overlap an L2 table, because a guest that writes to the cluster would change
the table.  So the offsets of all L2 tables are read when an image is opened, and each L2 entry is
compared with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qedfuse.disk.lookup.slices import L1
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.entryrules import NO_TABLES, EntryRules

if TYPE_CHECKING:
    from array import array

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header


class TableRegistry:
    """The L2 tables of one image, by their file offsets.

    Attributes:
        header: The same object as `QedLayer.header`; see there which of its fields are current.
        l2_tables: The file offsets of all L2 tables, ascending.  If the image is open for reading
            only, the tables for guest offsets past the end of the disk are missing.
        damaged: Whether damage was found since the image was opened.
    """

    def __init__(self, file: HostFile, header: Header) -> None:
        """Start without tables; `scan` finds the tables of the file."""
        self.header = header
        self.l2_tables = NO_TABLES
        self.damaged = False
        self._file = file
        self._geometry = header.geometry
        # Indices of the L1 entries that refer to an L2 table, and lay past the end of the disk when
        # they were recorded.  An interrupted resize can leave such entries.  If the disk has grown
        # since then, some of them may belong to the disk now.
        self._past_end: NDArray[np.int64] = np.empty(0, np.int64)
        # The end of the file when the image was opened.  In an image that is open for writing, an
        # entry that points past this end when it is first read from the file is bad.  Entries that
        # this program adds later may point past it: the table cache does not validate them.
        self._end_at_open = file.size()

    def set_header(self, header: Header) -> None:
        """Replace the header by a durable ``header``, in which the size of the disk has changed."""
        self.header = header

    def mark_damaged(self) -> None:
        """Record that the image is damaged: its tables contradict each other or the file."""
        self.damaged = True

    async def scan(self) -> None:
        """Read the L1 table, and record the L2 tables to which its entries point.

        Bad entries are ignored, and mark the image as damaged.  If the image is open for
        reading only, the L1 entries past the end of the disk are not read.

        Raises:
            CorruptImageError: Two L2 tables overlap and the image is open for writing.
            HostError: The host cannot read the L1 table.
        """
        start = self.header.l1_table_offset
        # The tables past the end of the disk come into use when the disk grows.
        writable = self._file.writable
        used = self._geometry.l1_used(self.header.image_size)
        length = (self._geometry.entries if writable else used) * ENTRY_BYTES
        found = []
        past_end = []
        async for first, values in read_table(self._file, start, length):
            bad = self._find_bad(L1, values)
            valid = values != UNALLOCATED
            if bad is not None:
                valid &= ~bad
            found.append(values[valid])
            if first + len(values) > used:
                indices = np.flatnonzero(valid) + first
                past_end.append(indices[indices >= used])
        self.l2_tables = np.sort(np.concatenate(found)) if found else self.l2_tables
        self._past_end = np.concatenate(past_end) if past_end else self._past_end
        if self._file.writable and len(self.l2_tables) > 1:
            self._refuse_overlaps()

    def _refuse_overlaps(self) -> None:
        """Raise if two L2 tables overlap, because a change of one would damage the other."""
        gaps = np.diff(self.l2_tables)
        where = np.flatnonzero(gaps < self._geometry.table_bytes)
        if where.size:
            first, second = (int(value) for value in self.l2_tables[where[0] : where[0] + 2])
            msg = (
                f"{self._file.name}: L1 table: found L2 tables at {first} and {second}, expected "
                f"each table to have its {self._geometry.table_bytes} bytes for itself"
            )
            raise CorruptImageError(msg)

    @property
    def missing_tables(self) -> int:
        """How many L2 tables must be added so that each cluster of the disk has an entry."""
        used = self._geometry.l1_used(self.header.image_size)
        # Tables past the end of the disk do not count here.
        beyond = len(self._past_end) and int((self._past_end >= used).sum())
        return used - len(self.l2_tables) + beyond

    def add(self, l1_index: int, offset: int) -> None:
        """Record a new L2 table by the index of its L1 entry and by its file offset."""
        where = int(np.searchsorted(self.l2_tables, offset))
        self.l2_tables = np.insert(self.l2_tables, where, offset)
        if l1_index >= self._geometry.l1_used(self.header.image_size):
            self._past_end = np.append(self._past_end, l1_index)

    def move(self, old: int, new: int) -> None:
        """Record that an L2 table lies at file offset ``new`` instead of ``old``."""
        tables = np.delete(self.l2_tables, np.searchsorted(self.l2_tables, np.uint64(old)))
        self.l2_tables = np.insert(tables, np.searchsorted(tables, np.uint64(new)), new)

    def remove(self, l1_index: int, offset: int) -> None:
        """Record that L1 entry ``l1_index`` no longer refers to the L2 table at ``offset``."""
        where = np.searchsorted(self.l2_tables, np.uint64(offset))
        self.l2_tables = np.delete(self.l2_tables, where)
        self._past_end = self._past_end[self._past_end != l1_index]

    def find_bad(self, level: int, entries: array[int]) -> bytes | None:
        """Validate entries that were just read from the file; set ``damaged`` if one is bad.

        Returns:
            One byte per entry, non-zero for a bad one; None if all are valid.
        """
        bad = self._find_bad(level, np.frombuffer(entries, np.uint64))
        return None if bad is None else bad.tobytes()

    def _find_bad(self, level: int, values: Values) -> Mask | None:
        """Return for each entry whether it is bad, and set ``damaged``; None if none is."""
        bad = self.entry_rules(level).invalid_mask(values)
        if bad is not None:
            self.damaged = True
        return bad

    def entry_rules(self, level: int) -> EntryRules:
        """Return the rules for the entries of a level."""
        # While this program has the image open for reading only, another program may make the file
        # longer, so the present end of the file counts.
        end = self._end_at_open if self._file.writable else self._file.size()
        if level == L1:
            return EntryRules(EntryLimits.for_l1(self.header, end))
        limits = EntryLimits.for_l2(self.header, end)
        # The bytes of a cluster that the end of the file cuts short can still be read.
        return EntryRules(limits, self.l2_tables, allow_cut_short=not self._file.writable)

    def explain(self, level: int, entry: str, value: int) -> str:
        """Return a message about a bad entry, with the rule that its ``value`` breaks.

        ``entry`` names the entry in the message.
        """
        return f"{self._file.name}: {entry}: {self.entry_rules(level).explain(value)}"
