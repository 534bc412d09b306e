"""Slices: parts of tables in memory, at most 64 KiB each.

A slice is *dirty* while it has changes that are not in the file and not in a running write-back.
It is *pinned* while a `Pins` block or a `WriteBack` uses it.  If it is neither, `TableCache` may
evict it whenever a task awaits something.  So a task that wants to change a slice must pin it
before it awaits anything, unless it awaits nothing before the change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import encode

if TYPE_CHECKING:
    from array import array
    from typing import Self

L1: Final = 1
L2: Final = 2
"""The levels of tables."""


class Slice:
    """A part of one L1 or L2 table, in memory.

    Attributes:
        offset: File offset of the slice's first entry.
        level: `L1` or `L2`.
        entries: The entries; only the methods `set`, `fill` and `put` of `TableCache` change them.
        bad: One byte per entry, non-zero where the entry is invalid; None if all are valid.
        pins: How many write-backs and `Pins` keep this slice in memory.
        changed_first: Index of the first dirty entry.
        changed_end: Index past the last dirty entry; equal to ``changed_first`` if none is dirty.
    """

    __slots__ = ("bad", "changed_end", "changed_first", "entries", "level", "offset", "pins")

    def __init__(self, offset: int, level: int, entries: array[int], bad: bytes | None) -> None:
        """Hold ``entries``, clean and not pinned."""
        self.offset = offset
        self.level = level
        self.entries = entries
        self.bad = bad
        self.pins = 0
        self.changed_first = self.changed_end = 0

    @property
    def dirty(self) -> bool:
        """Whether the slice has changes that the next write-back must take."""
        return self.changed_first < self.changed_end

    def touch(self, first: int, end: int) -> None:
        """Mark the entries from ``first`` up to ``end``, exclusive, as dirty."""
        if self.dirty:
            self.changed_first = min(self.changed_first, first)
            self.changed_end = max(self.changed_end, end)
        else:
            self.changed_first, self.changed_end = first, end


class Pins:
    """Keeps slices in memory until the end of a ``with`` block."""

    __slots__ = ("_slices",)

    def __init__(self, *slices: Slice) -> None:
        """Pin ``slices``; the caller must have awaited nothing since it got them."""
        self._slices = list(slices)
        for one in slices:
            one.pins += 1

    def add(self, added: Slice) -> None:
        """Pin one more slice; the caller must have awaited nothing since it got the slice."""
        added.pins += 1
        self._slices.append(added)

    def __enter__(self) -> Self:
        """Return this object; the slices are pinned already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unpin all slices."""
        for one in self._slices:
            one.pins -= 1


class WriteBack:
    """The changes that one slice had at one moment, for a write to the file.

    Attributes:
        source: The slice.
        first: Index of the first changed entry.
        stop: Index past the last changed entry.
        offset: File offset of ``data``.
        data: The entries from ``first`` up to ``stop``, exclusive, as bytes for the file.
    """

    __slots__ = ("data", "first", "offset", "source", "stop")

    def __init__(self, source: Slice) -> None:
        """Take the changes of a dirty slice, which is clean and pinned afterwards."""
        self.source = source
        self.first, self.stop = source.changed_first, source.changed_end
        self.offset = source.offset + self.first * ENTRY_BYTES
        self.data = encode(source.entries, self.first, self.stop)
        source.changed_first = source.changed_end = 0
        source.pins += 1

    def end(self, *, written: bool) -> None:
        """Unpin the slice; its changes are dirty again unless they were ``written``."""
        self.source.pins -= 1
        if not written:
            self.source.touch(self.first, self.stop)
