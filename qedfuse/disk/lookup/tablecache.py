"""Tables in memory: slices of at most 64 KiB, within a budget of bytes.

A legal table can be 1 GiB long, so tables are never held whole.  A slice that has
changes which are not in the file yet (dirty), or that somebody holds on to (pinned),
stays; all others can be dropped at any time and read again.  Whoever changes a slice
must not have awaited anything since he got it, unless he pinned it.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES, decode, encode
from qedfuse.util.lru import LRU
from qedfuse.util.singleflight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

L1: Final = 1
L2: Final = 2
"""Levels of tables."""

_OVERHEAD: Final = 256  # bytes of Python objects around a slice


class Slice:
    """A piece of one L1 or L2 table.

    Attributes:
        offset: File offset of the slice's first entry.
        level: `L1` or `L2`.
        entries: The entries; change them through `TableCache.set` and the like only.
        bad: One byte per entry, non-zero where the entry must not be used; None if
            all are good.
        pins: How many hold on to this slice: write-backs, and whoever is about to
            change it.
    """

    __slots__ = ("bad", "changed_first", "changed_last", "entries", "level", "offset", "pins")

    def __init__(self, offset: int, level: int, entries: array[int], bad: bytes | None) -> None:
        """Wrap entries that were just read."""
        self.offset = offset
        self.level = level
        self.entries = entries
        self.bad = bad
        self.pins = 0
        self.changed_first = self.changed_last = 0

    @property
    def dirty(self) -> bool:
        """Whether there are changes that no write-back has taken."""
        return self.changed_first < self.changed_last

    def touch(self, first: int, last: int) -> None:
        """Note that the entries from ``first`` up to ``last`` differ from the file."""
        if self.dirty:
            self.changed_first = min(self.changed_first, first)
            self.changed_last = max(self.changed_last, last)
        else:
            self.changed_first, self.changed_last = first, last


SliceStore: TypeAlias = LRU["tuple[int, int]", Slice]


def make_store(budget: int) -> SliceStore:
    """Make the memory that all images of a chain share for their tables, in bytes."""
    return LRU(
        budget,
        weigh=lambda part: len(part.entries) * ENTRY_BYTES + len(part.bad or b"") + _OVERHEAD,
        pinned=lambda part: part.dirty or part.pins > 0,
    )


class WriteBack:
    """One slice's changes at one moment, on their way to the file."""

    __slots__ = ("data", "first", "last", "offset", "part")

    def __init__(self, part: Slice) -> None:
        """Take the changes of a dirty slice; it counts as clean but stays pinned."""
        self.part = part
        self.first, self.last = part.changed_first, part.changed_last
        self.offset = part.offset + self.first * ENTRY_BYTES
        self.data = encode(part.entries, self.first, self.last)
        part.changed_first = part.changed_last = 0
        part.pins += 1

    def done(self, *, written: bool) -> None:
        """Unpin the slice; what could not be written is dirty again."""
        self.part.pins -= 1
        if not written:
            self.part.touch(self.first, self.last)


class TableCache:
    """The tables of one image file, by slices."""

    def __init__(
        self,
        file: HostFile,
        geometry: Geometry,
        store: SliceStore,
        judge: Callable[[int, array[int]], bytes | None],
    ) -> None:
        """Read tables from ``file``; ``judge(level, entries)`` tells which are bad."""
        self._file = file
        self._store = store
        self._judge = judge
        self._slice_bytes = min(SLICE_BYTES, geometry.table_bytes)
        self.slice_entries = self._slice_bytes // ENTRY_BYTES
        self._loads: SingleFlight[int] = SingleFlight()
        self.get = store.get
        """Return a slice by its `key`, if it is in memory."""
        self.blank = Slice(0, L2, array("Q", bytes(self._slice_bytes)), None)
        """Stands for all slices of tables that are not there; never to be changed."""
        self._dirty: dict[int, Slice] = {}
        self._reserved: set[int] = set()
        # Verdicts on slices that we have written ourselves.  Judging those anew would
        # be wrong: a wild entry that pointed past the end of the file when we opened it
        # points at somebody's cluster once the file has grown.
        self._verdicts: dict[int, bytes | None] = {}

    def cached(self, table: int, index: int) -> Slice | None:
        """Return the slice with entry ``index`` of the table at a file offset, if in memory."""
        return self.get(self.key(table, index))

    def key(self, table: int, index: int) -> tuple[int, int]:
        """Name the slice with entry ``index`` of the table at a file offset, for `get`."""
        return id(self), table + index // self.slice_entries * self._slice_bytes

    async def load(self, table: int, index: int, level: int) -> Slice:
        """Return the slice with entry ``index`` of a table, reading it if need be.

        Raises:
            HostError: The host cannot read it.
        """
        part = self.cached(table, index)
        while part is None:
            offset = table + index // self.slice_entries * self._slice_bytes
            await self._loads.run(offset, lambda: self._fetch(offset, level))  # noqa: B023  awaited here
            part = self.cached(table, index)
        return part

    async def _fetch(self, offset: int, level: int) -> None:
        """Read one slice into the store."""
        raw = await self._file.pread(offset, self._slice_bytes)
        if len(raw) < self._slice_bytes:
            msg = f"{self._file.name}: table at {offset}: the file ends within it"
            raise HostError(msg)
        entries = decode(raw)
        bad = self.verdict(level, offset, entries)
        self._store.put((id(self), offset), Slice(offset, level, entries, bad))

    def verdict(self, level: int, offset: int, entries: array[int]) -> bytes | None:
        """Mark the entries of a slice, as it is in the file, that must not be used."""
        known = offset in self._verdicts
        return self._verdicts[offset] if known else self._judge(level, entries)

    async def reserve(self, part: Slice) -> None:
        """Make sure that a slice that is pinned can be written back to a full host later.

        Its place in the file may be a hole.  It is better to refuse the guest's write
        than to accept it and to find no room at the flush.

        Raises:
            NoSpaceError: The host is full now.
        """
        if part.offset not in self._reserved:
            await self._file.reserve(part.offset, self._slice_bytes)
            self._reserved.add(part.offset)

    def is_reserved(self, part: Slice) -> bool:
        """Tell whether `reserve` has been done."""
        return part.offset in self._reserved

    @staticmethod
    def pin(part: Slice) -> Slice:
        """Hold on to a slice that was just returned, until its ``pins`` is lowered again."""
        part.pins += 1
        return part

    def set(self, part: Slice, index: int, value: int) -> None:
        """Change the entry at ``index`` within a slice; it reaches the file at a commit."""
        part.entries[index] = value
        part.touch(index, index + 1)
        self._dirty[part.offset] = part

    def fill(self, part: Slice, first: int, count: int, value: int) -> None:
        """Change ``count`` entries to one value, as `set` does."""
        if count:
            part.entries[first : first + count] = array("Q", (value,)) * count
            part.touch(first, first + count)
            self._dirty[part.offset] = part

    def put(self, part: Slice, first: int, values: NDArray[np.uint64]) -> None:
        """Change the entries from ``first`` on to these values, as `set` does."""
        entries = np.frombuffer(part.entries, np.uint64)[first : first + len(values)]
        changed = np.flatnonzero(entries != values)
        if len(changed):
            entries[:] = values
            part.touch(first + int(changed[0]), first + int(changed[-1]) + 1)
            self._dirty[part.offset] = part

    def evict(self, part: Slice) -> None:
        """Drop a slice that is not going to be needed soon, unless it has to stay."""
        if not part.dirty and not part.pins:
            self._store.drop((id(self), part.offset))

    def move(self, old: int, new: int, length: int) -> None:
        """Note that a table was copied to another place, and drop what is held of the old one.

        Nothing of it may be pinned or have unwritten changes.
        """
        for at in range(0, length, self._slice_bytes):
            self._store.drop((id(self), old + at))
            self._reserved.discard(old + at)
            if old + at in self._verdicts:
                # Entries that we made ourselves must not be judged by what was there at
                # the beginning, wherever they are.
                self._verdicts[new + at] = self._verdicts.pop(old + at)
            else:
                self._verdicts.pop(new + at, None)

    def forget(self, table: int, length: int) -> None:
        """Drop what is held of a table that no entry refers to any more.

        Nothing of it may be pinned or have unwritten changes.
        """
        for at in range(table, table + length, self._slice_bytes):
            self._store.drop((id(self), at))
            self._reserved.discard(at)
            self._verdicts.pop(at, None)

    @property
    def dirty_bytes(self) -> int:
        """How much memory the slices with unwritten changes hold."""
        return len(self._dirty) * self._slice_bytes

    def take_dirty(self) -> tuple[list[WriteBack], list[WriteBack]]:
        """Take all changes, as they are now: those of L2 tables, those of the L1 table."""
        taken: tuple[list[WriteBack], list[WriteBack]] = ([], [])
        for offset, part in sorted(self._dirty.items()):
            self._verdicts[offset] = part.bad
            taken[part.level == L1].append(WriteBack(part))
        self._dirty.clear()
        return taken

    def give_back(self, write: WriteBack, *, written: bool) -> None:
        """End a write-back that `take_dirty` began."""
        write.done(written=written)
        if not written:
            self._dirty[write.part.offset] = write.part
