"""The map of a cached object: a file with the checksum of each unit that was stored."""

from __future__ import annotations

import os
import struct
from itertools import compress
from typing import TYPE_CHECKING, Final

from qedfuse.hostio.systemcalls import write_all

if TYPE_CHECKING:
    from collections.abc import Iterable

_ENTRY: Final = struct.Struct("<II")
"""An entry of the map: the checksum of a unit, and a mark."""
_PRESENT: Final = 0x51454455
"""The mark of a used entry; a hole of the map lacks it."""

_ENTRIES_PER_STEP: Final = 1 << 16
"""How many entries of the map are read in one step: 512 KiB."""


def map_bytes(units: int) -> int:
    """Return the length in bytes of the map of an object that has ``units`` units."""
    return units * _ENTRY.size


class ChecksumMap:
    """Reads and writes the checksums in an open map; each call that fails raises OSError.

    Attributes:
        fd: The descriptor of the map, which the caller closes.
    """

    def __init__(self, fd: int) -> None:
        """Take over the open file ``fd``."""
        self.fd = fd

    def checksum(self, unit: int) -> int | None:
        """Return the checksum of a unit; None if the unit has no entry."""
        raw = os.pread(self.fd, _ENTRY.size, unit * _ENTRY.size)
        if len(raw) < _ENTRY.size:
            return None
        checksum, mark = _ENTRY.unpack(raw)
        return int(checksum) if mark == _PRESENT else None

    def write_checksums(self, first: int, checksums: Iterable[int]) -> None:
        """Write the entries of adjacent units, beginning with the unit ``first``."""
        entries = b"".join(_ENTRY.pack(checksum, _PRESENT) for checksum in checksums)
        write_all(self.fd, first * _ENTRY.size, (entries,))

    def has_units(self, first: int, count: int, needed: bytes | None) -> bool:
        """Return whether the map has an entry for each needed unit of a range.

        Args:
            first: The first unit of the range.
            count: Number of units of the range.
            needed: A byte for each unit: 1 if it is needed, 0 if not; None for all units.
        """
        for begin in range(0, count, _ENTRIES_PER_STEP):
            step = min(_ENTRIES_PER_STEP, count - begin)
            wanted = b"\1" * step if needed is None else needed[begin:][:step]
            marks = self._marks(first + begin, step)
            if list(compress(marks, wanted)).count(_PRESENT) != wanted.count(1):
                return False
        return True

    def has_any(self, first: int, last: int) -> bool:
        """Return whether the map has an entry for any of the units ``first`` to ``last``."""
        return _PRESENT in self._marks(first, last + 1 - first)

    def _marks(self, first: int, count: int) -> tuple[int, ...]:
        """Return the marks of adjacent entries; fewer if the map was truncated."""
        raw = os.pread(self.fd, count * _ENTRY.size, first * _ENTRY.size)
        entries = len(raw) // _ENTRY.size
        return struct.unpack(f"<{2 * entries}I", raw[: entries * _ENTRY.size])[1::2]
