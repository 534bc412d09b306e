"""The table cache: slices of tables, read when they are needed, within a budget of bytes.

A table can be 1 GiB long, so no table is kept in memory as a whole.  A slice stays in memory while
it is dirty or pinned (`Slice`).  All other slices may be evicted whenever a task awaits something.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from qedfuse.disk.lookup.slices import L1, L2, Slice, WriteBack
from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES, decode
from qedfuse.util.lru import LRU
from qedfuse.util.singleflight import SingleFlight

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

_OVERHEAD_BYTES: Final = 256
"""Bytes of memory that the Python objects of a slice take besides its entries."""

SliceStore: TypeAlias = LRU["tuple[int, int]", Slice]
"""Slices by `TableCache.key`.  `FlattenedBacking` keeps its merged tables here too, as slices."""


def make_store(budget: int) -> SliceStore:
    """Make the store that all images of a chain share for their slices.

    ``budget`` is in bytes.  Dirty and pinned slices and the slice that was stored last can exceed
    it.
    """
    return LRU(
        budget,
        weigh=lambda one: len(one.entries) * ENTRY_BYTES + len(one.bad or b"") + _OVERHEAD_BYTES,
        pinned=lambda one: one.dirty or one.pins > 0,
    )


class TableCache:
    """The tables of one image file, as slices."""

    def __init__(
        self,
        file: HostFile,
        geometry: Geometry,
        store: SliceStore,
        find_bad: Callable[[int, array[int]], bytes | None],
    ) -> None:
        """Cache the tables of ``file``; nothing is read yet.

        Args:
            file: The image file.
            geometry: The geometry of the image.
            store: Holds the slices of all images of the chain.
            find_bad: Returns `Slice.bad` for a level and the entries of a slice.
        """
        self._file = file
        self._store = store
        self._find_bad = find_bad
        self._slice_bytes = min(SLICE_BYTES, geometry.table_bytes)
        self.slice_entries = self._slice_bytes // ENTRY_BYTES
        """Number of entries in each slice."""
        self.loads = 0
        """How many slices have been read from the file so far."""
        self._reads_under_way: SingleFlight[int] = SingleFlight()
        self.cache_key = id(self)
        """First part of each `key`, because the store has the slices of several images."""
        self.get = store.get
        """Return a slice by its `key`; None if it is not in memory."""
        self.empty_slice = Slice(0, L2, array("Q", bytes(self._slice_bytes)), None)
        """Stands for every slice of a table that does not exist; no caller may change it."""
        # The dirty slices, by file offset.
        self._dirty: dict[int, Slice] = {}
        # File offsets of the slices whose host space is reserved (`reserve`), dirty or not.
        self._reserved: set[int] = set()
        # `Slice.bad` of each slice that was written back, by file offset.  If such a slice is read
        # again, it must not be validated again: new entries can point past the end that the file
        # had when the image was opened, and would count as bad (`TableRegistry.entry_rules`).
        self._known_bad: dict[int, bytes | None] = {}

    def cached(self, table_offset: int, index: int) -> Slice | None:
        """Return the slice with entry ``index`` of a table; None if it is not in memory."""
        return self.get(self.key(table_offset, index))

    def key(self, table_offset: int, index: int) -> tuple[int, int]:
        """Return the key by which `get` finds the slice with entry ``index`` of a table."""
        return self.cache_key, table_offset + index // self.slice_entries * self._slice_bytes

    async def load(self, table_offset: int, index: int, level: int) -> Slice:
        """Return the slice with entry ``index`` of a table; read it if it is not in memory.

        Raises:
            HostError: The host cannot read the slice, or the file ends within it.
        """
        found = self.cached(table_offset, index)
        while found is None:
            offset = table_offset + index // self.slice_entries * self._slice_bytes
            await self._reads_under_way.run(offset, lambda: self._fetch(offset, level))  # noqa: B023  awaited here
            found = self.cached(table_offset, index)
        return found

    async def _fetch(self, offset: int, level: int) -> None:
        """Read the slice at a file offset into the store."""
        raw = await self._file.pread(offset, self._slice_bytes)
        if len(raw) < self._slice_bytes:
            msg = (
                f"{self._file.name}: part of a table at {offset}: found {len(raw)} bytes, "
                f"expected {self._slice_bytes}"
            )
            raise HostError(msg)
        self.loads += 1
        entries = decode(raw)
        bad = self.bad_entries(level, offset, entries)
        self._store.put((self.cache_key, offset), Slice(offset, level, entries, bad))

    def bad_entries(self, level: int, offset: int, entries: array[int]) -> bytes | None:
        """Return `Slice.bad` for the entries of a slice that were read from a file offset."""
        is_known = offset in self._known_bad
        return self._known_bad[offset] if is_known else self._find_bad(level, entries)

    async def reserve(self, pinned: Slice) -> None:
        """Reserve host space for the write-back of a pinned slice, if none is reserved yet.

        The slice may lie in a hole of the file.  Then the host could run out of space at the
        flush, after the guest's write has been accepted.

        Raises:
            NoSpaceError: The host is full.
            HostError: A system call failed.
        """
        if pinned.offset not in self._reserved:
            await self._file.reserve(pinned.offset, self._slice_bytes)
            self._reserved.add(pinned.offset)

    def is_reserved(self, slice_: Slice) -> bool:
        """Return whether `reserve` has reserved host space for the slice."""
        return slice_.offset in self._reserved

    def set(self, slice_: Slice, index: int, value: int) -> None:
        """Change the entry at ``index`` within a slice, and mark it as dirty."""
        slice_.entries[index] = value
        slice_.touch(index, index + 1)
        self._dirty[slice_.offset] = slice_

    def fill(self, slice_: Slice, first: int, count: int, value: int) -> None:
        """Set the ``count`` entries that begin at ``first`` to ``value``; mark them as dirty."""
        if count:
            slice_.entries[first : first + count] = array("Q", (value,)) * count
            slice_.touch(first, first + count)
            self._dirty[slice_.offset] = slice_

    def put(self, slice_: Slice, first: int, values: NDArray[np.uint64]) -> None:
        """Replace the entries that begin at ``first`` by ``values``; mark what differs as dirty."""
        entries = np.frombuffer(slice_.entries, np.uint64)[first : first + len(values)]
        changed = np.flatnonzero(entries != values)
        if len(changed):
            entries[:] = values
            slice_.touch(first + int(changed[0]), first + int(changed[-1]) + 1)
            self._dirty[slice_.offset] = slice_

    def evict(self, slice_: Slice) -> None:
        """Drop a slice from memory, unless it is dirty or pinned."""
        if not slice_.dirty and not slice_.pins:
            self._store.drop((self.cache_key, slice_.offset))

    def move(self, old: int, new: int, length: int) -> None:
        """Record that a table of ``length`` bytes was copied from file offset ``old`` to ``new``.

        Its slices are dropped from memory, so none of them may be pinned or dirty.
        """
        for distance in range(0, length, self._slice_bytes):
            self._store.drop((self.cache_key, old + distance))
            self._reserved.discard(old + distance)
            if old + distance in self._known_bad:
                # Entries that were written back must not be validated at the new offset either.
                self._known_bad[new + distance] = self._known_bad.pop(old + distance)
            else:
                self._known_bad.pop(new + distance, None)

    def forget(self, table_offset: int, length: int) -> None:
        """Drop everything about a table to which no entry refers any more.

        No slice of the table may be pinned or dirty.
        """
        for offset in range(table_offset, table_offset + length, self._slice_bytes):
            self._store.drop((self.cache_key, offset))
            self._reserved.discard(offset)
            self._known_bad.pop(offset, None)

    @property
    def dirty_bytes(self) -> int:
        """How many bytes the entries of the dirty slices take."""
        return len(self._dirty) * self._slice_bytes

    def has_few_dirty(self, max_count: int) -> bool:
        """Return whether at most ``max_count`` slices are dirty, all of them of L2 tables."""
        return len(self._dirty) <= max_count and not any(
            dirty.level == L1 for dirty in self._dirty.values()
        )

    def take_dirty(self) -> tuple[list[WriteBack], list[WriteBack]]:
        """Take the changes of all dirty slices.

        The slices are clean and pinned afterwards.  The caller must end each write-back with
        `end_write_back`.

        Returns:
            The write-backs of L2 tables, and those of the L1 table.
        """
        taken: tuple[list[WriteBack], list[WriteBack]] = ([], [])
        for offset, dirty in sorted(self._dirty.items()):
            self._known_bad[offset] = dirty.bad
            taken[dirty.level == L1].append(WriteBack(dirty))
        self._dirty.clear()
        return taken

    def end_write_back(self, write: WriteBack, *, written: bool) -> None:
        """End a write-back of `take_dirty`; the changes are dirty again unless ``written``."""
        write.end(written=written)
        if not written:
            self._dirty[write.source.offset] = write.source
