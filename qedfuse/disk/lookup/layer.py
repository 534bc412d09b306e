"""One image of a chain: where is what?  Lookup answers in extents and never acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.tablecache import L1, L2, SliceStore, TableCache
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED, ZERO
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.entryrules import NO_TABLES, EntryRules
from qedfuse.ondisk.table import SLICE_BYTES, decode, runs

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.tablecache import Slice
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


_MOST_KEYS: Final = 4096
"""Slices whose place is remembered; they are found again in less than a microsecond."""


class Layer(Protocol):
    """A file of the chain, seen as a disk."""

    file: HostFile

    @property
    def size(self) -> int:
        """Bytes of the disk that this layer describes."""

    async def lookup(self, start: int, length: int) -> list[Extent]:
        """Tell how this layer, without its base, stores a range that lies within it."""


class RawLayer:
    """A raw base: every byte is data, at its own offset."""

    def __init__(self, file: HostFile) -> None:
        """Show a file as it is."""
        self.file = file
        self.size = file.size()

    async def lookup(self, start: int, length: int) -> list[Extent]:
        """Tell how the range is stored: as it is."""
        return [Extent(Kind.DATA, start, length, start)]


class QedLayer:
    """A QED image: two levels of tables.

    The L1 table is read through once at opening, to know where the L2 tables lie: a
    data cluster may not lie over one of them (that would let a guest write its own
    tables), nor over the L1 table or the header.
    """

    def __init__(self, file: HostFile, header: Header, store: SliceStore) -> None:
        """Wrap a file whose header has been read; call `scan_l1` before anything else."""
        self.file = file
        self.header = header
        self.geometry = header.geometry
        self.tables = TableCache(file, header.geometry, store, self.judge)
        self._l2_tables = NO_TABLES
        # Indices of L1 entries in use past the disk's end, left by a resize that broke off.
        self._past_end: NDArray[np.int64] = np.empty(0, np.int64)
        # Where the file ended when we opened it.  No entry that was in the file then
        # may point past it; those that we add ourselves are never judged.
        self._end_at_open = file.size()
        # Where in memory the slices that were used lately are, by their number.
        self._keys: dict[int, tuple[int, int]] = {}
        # Whether a bad entry was seen while writing: see `NeedCheck.clear`.
        self.damaged = False

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.header.image_size

    @property
    def _end(self) -> int:
        """Where the entries in the file must end; for a reader the file may have grown."""
        return self._end_at_open if self.file.writable else self.file.size()

    async def scan_l1(self) -> None:
        """Collect the places of all L2 tables.  Skips the holes of a sparse L1 table.

        Raises:
            CorruptImageError: Two L2 tables overlap and the image is to be written.
        """
        start = self.header.l1_table_offset
        # A writer must also know the tables past the end of the disk: once the disk has
        # grown, they are in use.
        writable = self.file.writable
        used = self.geometry.l1_used(self.header.image_size)
        end = start + (self.geometry.entries if writable else used) * ENTRY_BYTES
        found = []
        past = []
        position: int | None = start
        while position is not None and position < end:
            raw = await self.file.pread(position, min(SLICE_BYTES, end - position))
            entries = decode(raw[: len(raw) & -ENTRY_BYTES])
            values = np.frombuffer(entries, np.uint64)
            good = values != UNALLOCATED
            bad = self.judge(L1, entries)
            if bad is not None:
                good &= np.frombuffer(bad, np.uint8) == 0
            found.append(values[good])
            first = (position - start) // ENTRY_BYTES
            if first + len(values) > used:
                indices = np.flatnonzero(good) + first
                past.append(indices[indices >= used])
            position += SLICE_BYTES
            data = await self.file.next_data(position)
            # Slices begin at multiples of a slice from the table's start.
            position = data and max(position, data - (data - start) % SLICE_BYTES)
        self._l2_tables = np.sort(np.concatenate(found)) if found else self._l2_tables
        self._past_end = np.concatenate(past) if past else self._past_end
        if self.file.writable and len(self._l2_tables) > 1:
            self._refuse_overlaps()

    def _refuse_overlaps(self) -> None:
        """Refuse to write where one table's change would be another's damage."""
        gaps = np.diff(self._l2_tables)
        where = np.flatnonzero(gaps < self.geometry.table_bytes)
        if where.size:
            first, second = (int(value) for value in self._l2_tables[where[0] : where[0] + 2])
            msg = (
                f"{self.file.name}: L1 table: found L2 tables at {first} and {second}, expected "
                f"each table to have its {self.geometry.table_bytes} bytes for itself"
            )
            raise CorruptImageError(msg)

    @property
    def l2_tables(self) -> NDArray[np.uint64]:
        """The file offsets of all L2 tables, ascending."""
        return self._l2_tables

    @property
    def missing_tables(self) -> int:
        """How many L2 tables the disk may still need."""
        used = self.geometry.l1_used(self.header.image_size)
        beyond = len(self._past_end) and int((self._past_end >= used).sum())
        return used - len(self._l2_tables) + beyond

    def add_table(self, l1_index: int, offset: int) -> None:
        """Note a new L2 table."""
        place = int(np.searchsorted(self._l2_tables, offset))
        self._l2_tables = np.insert(self._l2_tables, place, offset)
        if l1_index >= self.geometry.l1_used(self.header.image_size):
            self._past_end = np.append(self._past_end, l1_index)

    def move_table(self, old: int, new: int) -> None:
        """Note that an L2 table lies elsewhere; all of it must have been written back."""
        tables = np.delete(self._l2_tables, np.searchsorted(self._l2_tables, np.uint64(old)))
        self._l2_tables = np.insert(tables, np.searchsorted(tables, np.uint64(new)), new)
        self.tables.move(old, new, self.geometry.table_bytes)
        self._keys.clear()

    def drop_table(self, l1_index: int, offset: int) -> None:
        """Note that an L2 table is gone; all of it must have been written back."""
        place = np.searchsorted(self._l2_tables, np.uint64(offset))
        self._l2_tables = np.delete(self._l2_tables, place)
        self._past_end = self._past_end[self._past_end != l1_index]
        self.tables.forget(offset, self.geometry.table_bytes)
        self._keys.clear()

    def judge(self, level: int, entries: array[int]) -> bytes | None:
        """Mark the entries just read that must not be used; None if all are good."""
        values = np.frombuffer(entries, np.uint64)
        used = values > ZERO if level == L2 else values != UNALLOCATED
        places = values[used]
        if not len(places):
            return None
        rules = self._rules(level)
        if rules.all_valid(np.sort(places)):
            return None
        bad = used & ~rules.valid_mask(values)
        self.damaged = self.damaged or bool(bad.any())
        return bad.astype(np.uint8).tobytes() if bad.any() else None

    def _rules(self, level: int) -> EntryRules:
        """Return the rules for the entries of a level."""
        if level == L1:
            return EntryRules(EntryLimits.for_l1(self.header, self._end))
        limits = EntryLimits.for_l2(self.header, self._end)
        # A cluster that the file cuts short still has bytes worth reading.
        return EntryRules(limits, self._l2_tables, allow_cut_short=not self.file.writable)

    def _reason(self, level: int, what: str, value: int) -> str:
        """Say what is wrong with an entry that `judge` marked."""
        return f"{self.file.name}: {what}: {self._rules(level).explain(value)}"

    async def table_at(self, l1_index: int) -> tuple[int, str]:
        """Give the file offset of an L2 table, 0 if there is none, and what is bad about it."""
        start = self.header.l1_table_offset
        part = self.tables.cached(start, l1_index)
        if part is None:
            part = await self.tables.load(start, l1_index, L1)
        index = l1_index % self.tables.slice_entries
        value = part.entries[index]
        if part.bad is not None and part.bad[index]:
            return 0, self._reason(L1, f"L1 entry {l1_index}", value)
        return value, ""

    def cached_slice(self, number: int) -> Slice | None:
        """Give a slice of L2 entries, by its number from the disk's beginning, if in memory.

        What has no table yet is a slice of zeros.
        """
        key = self._keys.get(number)
        if key is None:
            first = number * self.tables.slice_entries
            l1_index, index = divmod(first, self.geometry.entries)
            part = self.tables.cached(self.header.l1_table_offset, l1_index)
            if part is None or part.bad is not None:
                return None
            table = part.entries[l1_index % self.tables.slice_entries]
            if not table:
                return self.tables.blank
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            key = self._keys[number] = self.tables.key(table, index)
        return self.tables.get(key)

    def next_cached_table(self, l1_index: int) -> int | None:
        """Find the first L1 entry in use at or past an index; one past the disk if there is none.

        None if that part of the L1 table is not in memory.
        """
        index = self.no_table_before(l1_index)
        known = index >= self.geometry.l1_used(self.header.image_size) or self.tables.cached(
            self.header.l1_table_offset, index
        )
        return index if known else None

    def no_table_before(self, l1_index: int) -> int:
        """Find the first L1 entry at or past an index that is in use or not in memory."""
        end, step = self.geometry.l1_used(self.header.image_size), self.tables.slice_entries
        while l1_index < end:
            part = self.tables.cached(self.header.l1_table_offset, l1_index)
            if part is None:
                return l1_index
            used = np.frombuffer(part.entries, np.uint64)[l1_index % step :] != UNALLOCATED
            first = int(used.argmax())
            if used[first]:
                return l1_index + first
            l1_index += len(used)
        return l1_index

    async def lookup(self, start: int, length: int) -> list[Extent]:
        """Tell how this image, without its base, stores a range that lies within it."""
        result: list[Extent] = []
        end = start + length
        geometry = self.geometry
        while start < end:
            l1_index = geometry.l1_index(start)
            table, reason = await self.table_at(l1_index)
            last = min(end, (l1_index + 1) * geometry.table_span)
            if not table:
                kind = Kind.BAD if reason else Kind.UNALLOCATED
                result.append(Extent(kind, start, last - start, reason=reason))
                start = last
                continue
            index = geometry.l2_index(start)
            part = self.tables.cached(table, index)
            if part is None:
                part = await self.tables.load(table, index, L2)
            # The slice ends earlier than the request in all but small requests.
            in_slice = index % self.tables.slice_entries
            slice_start = geometry.floor(start) - in_slice * geometry.cluster_size
            slice_end = slice_start + len(part.entries) * geometry.cluster_size
            last = min(last, slice_end)
            result.extend(self._in_slice(part, slice_start, start, last, l1_index))
            start = last
        return result

    def _in_slice(
        self, part: Slice, slice_start: int, start: int, end: int, l1_index: int
    ) -> Iterator[Extent]:
        """Turn the entries of one slice into extents; ``slice_start`` is its guest offset."""
        geometry = self.geometry
        size = geometry.cluster_size
        first = (start - slice_start) >> geometry.cluster_bits
        last = geometry.clusters(end - slice_start)
        found = runs(part.entries, first, last, size)
        if part.bad is not None:
            found = ((at, 1, part.entries[at]) for at in range(first, last))
        for index, count, value in found:
            run_start = slice_start + index * size
            here = max(start, run_start)
            stop = min(end, run_start + count * size)
            if value == UNALLOCATED:
                yield Extent(Kind.UNALLOCATED, here, stop - here)
            elif value == ZERO:
                yield Extent(Kind.ZERO, here, stop - here)
            elif part.bad is not None and part.bad[index]:
                l2_index = geometry.l2_index(run_start)
                reason = self._reason(L2, f"L1 entry {l1_index}: L2 entry {l2_index}", value)
                yield Extent(Kind.BAD, here, stop - here, reason=reason)
            else:
                yield from self._data(here, stop, value + here - run_start)

    def _data(self, start: int, stop: int, file_offset: int) -> Iterator[Extent]:
        """Give a run of data; what the end of the file cuts off for a reader is bad."""
        length = stop - start
        if not self.file.writable:
            present = self.file.size() - file_offset
            if present < length:
                present = max(0, present)
                if present:
                    yield Extent(Kind.DATA, start, present, file_offset)
                reason = (
                    f"{self.file.name}: cluster at {file_offset}: the file ends at "
                    f"{self.file.size()}, expected at least {file_offset + length} bytes"
                )
                yield Extent(Kind.BAD, start + present, length - present, reason=reason)
                return
        yield Extent(Kind.DATA, start, length, file_offset)
