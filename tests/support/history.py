"""What a disk was asked to do and when, to judge what a crash has left of it (rule D6).

Every sector of the test's disks holds one number, repeated: 0 for zeros, a number of its
own for each sector of a base, and one for each write.  A sector that holds anything
else, or a mixture, is a third thing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qedfuse.ondisk.constants import ZERO
from tests.support.disks import header_of, inspect_image
from tests.support.hostfiles import SECTOR, RecordingFile, Sync, Truncate, Write, apply

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.disk import Disk

WORDS: Final = SECTOR // 8
MIXED: Final = (1 << 64) - 1
"""Stands for a sector that does not hold one number."""

NEVER: Final = 1 << 62


def stamped(numbers: NDArray[np.uint64]) -> bytes:
    """Make sectors that hold the numbers."""
    return np.repeat(numbers, WORDS).astype("<u8").tobytes()


def stamps(content: bytes) -> NDArray[np.uint64]:
    """Read the numbers that sectors hold, or `MIXED`."""
    words = np.frombuffer(content, "<u8").reshape(-1, WORDS)
    return np.where((words == words[:, :1]).all(axis=1), words[:, 0], np.uint64(MIXED))


def disk_stamps(image: bytes | bytearray, below: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Read the numbers on the disk of an image over a base that holds ``below``.

    Independent of the code under test.  The tables must be good.
    """
    header = header_of(image)
    geometry = header.geometry
    size = header.image_size // SECTOR
    result = np.zeros(size, np.uint64)
    shared = min(size, len(below))
    result[:shared] = below[:shared]
    per_cluster = header.cluster_size // SECTOR
    whole = len(image) // SECTOR * SECTOR
    sectors = stamps(bytes(image[:whole]))
    for l1_index, table in _entries(image, header.l1_table_offset, geometry.table_bytes):
        for index, value in _entries(image, table, geometry.table_bytes):
            start = (l1_index * geometry.entries + index) * per_cluster
            room = max(0, min(per_cluster, size - start))
            place = value // SECTOR
            part = 0 if value == ZERO else sectors[place : place + room]
            result[start : start + room] = part
    return result


def _entries(image: bytes | bytearray, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """List a table's entries in use, with their indices."""
    table = np.frombuffer(bytes(image[offset : offset + length]), "<u8")
    for index in np.flatnonzero(table).tolist():
        yield index, int(table[index])


@dataclass
class Event:
    """A request: when it began and ended, in the order of requests and in host changes."""

    began: int
    began_at: int
    ended: int = NEVER
    ended_at: int = NEVER
    first: int = 0
    last: int = 0
    number: int = 0
    size: int = 0


@dataclass
class History:
    """Carries out requests on a disk and remembers them."""

    disk: Disk
    file: RecordingFile
    below: NDArray[np.uint64]
    writes: list[Event] = field(default_factory=list)
    flushes: list[Event] = field(default_factory=list)
    resizes: list[Event] = field(default_factory=list)
    _clock: int = 0
    _allowed: dict[int, dict[int, set[int]]] = field(default_factory=dict)

    def _begin(self, events: list[Event]) -> Event:
        self._clock += 1
        event = Event(self._clock, len(self.file.changes))
        events.append(event)
        return event

    def _end(self, event: Event) -> None:
        self._clock += 1
        event.ended, event.ended_at = self._clock, len(self.file.changes)

    async def write(self, first: int, count: int) -> None:
        """Write ``count`` sectors with a number of their own."""
        event = self._begin(self.writes)
        event.first, event.last, event.number = first, first + count, len(self.writes)
        data = stamped(np.full(count, event.number, np.uint64))
        assert await self.disk.write(first * SECTOR, data) == len(data)
        self._end(event)

    async def flush(self) -> None:
        """Flush."""
        event = self._begin(self.flushes)
        await self.disk.flush()
        self._end(event)

    async def resize(self, size: int) -> None:
        """Grow the disk to ``size`` bytes."""
        event = self._begin(self.resizes)
        event.size = size
        await self.disk.resize(size)
        self._end(event)

    def closed(self) -> None:
        """Note that the disk has been closed without an error: all of it is durable."""
        event = self._begin(self.flushes)
        self._end(event)

    def _allowed_after(self, flush: int) -> dict[int, set[int]]:
        """Tell for each written sector what it may hold once a flush that began then is over.

        A write that was over before the flush began is durable: whatever was over
        before that write began is gone.
        """
        if flush not in self._allowed:
            by_sector: dict[int, list[Event]] = {}
            for event in self.writes:
                for sector in range(event.first, event.last):
                    by_sector.setdefault(sector, []).append(event)
            self._allowed[flush] = result = {}
            for sector, events in by_sector.items():
                newest = max((e.began for e in events if e.ended < flush), default=0)
                result[sector] = {e.number for e in events if e.ended > newest}
                if not newest:
                    result[sector].add(int(self.original(sector)))
        return self._allowed[flush]

    def original(self, sector: int) -> int:
        """Tell what a sector held before the first write."""
        old = min(len(self.below), self._first_size // SECTOR)
        return int(self.below[sector]) if sector < old else 0

    @property
    def _first_size(self) -> int:
        return header_of(self.file.initial).image_size

    def violations(self, count: int, image: bytes | bytearray) -> list[str]:
        """Judge what a crash after ``count`` host changes has left; an empty list is good."""
        problems = list(inspect_image(image).errors)
        if problems:
            return problems
        size = header_of(image).image_size
        least = max((e.size for e in self.resizes if e.ended_at <= count), default=0)
        if size < least:
            problems.append(f"the disk has {size} bytes, and was grown to {least}")
        flush = max((e.began for e in self.flushes if e.ended_at <= count), default=0)
        found = disk_stamps(image, self.below)
        expected = disk_stamps(self.file.initial, self.below)
        expected = np.concatenate([expected, np.zeros(max(0, len(found) - len(expected)), "<u8")])
        allowed = self._allowed_after(flush)
        changed = np.flatnonzero(found != expected[: len(found)]).tolist()
        problems += [
            f"sector {sector} holds {found[sector]}, and was never written"
            for sector in changed
            if sector not in allowed
        ]
        problems += [
            f"sector {sector} holds {found[sector]}, expected one of {sorted(numbers)}"
            for sector, numbers in allowed.items()
            if sector < len(found) and int(found[sector]) not in numbers
        ]
        return problems[:5]


def order_violations(file: RecordingFile) -> list[str]:
    """Judge the order of the host changes themselves (rules D2 and D3).

    When an entry is written, what it points to has been synced: the L2 table for an L1
    entry.  When any entry is written, NEED_CHECK in the header has been synced.
    """
    final = header_of(file.content)
    geometry = final.geometry
    l1_start = final.l1_table_offset
    l2_tables = [table for _, table in _entries(file.content, l1_start, geometry.table_bytes)]
    tables = {l1_start: "L1", **dict.fromkeys(l2_tables, "L2")}
    content: Any = bytearray(file.initial)
    bit = header_of(content).need_check
    unsynced: set[int] = set()
    problems = []
    for number, change in enumerate(file.changes):
        apply(content, change)
        if isinstance(change, Sync):
            bit, unsynced = header_of(content).need_check, set()
        if isinstance(change, Truncate | Sync):
            continue
        for table, level in tables.items():
            if table <= change.offset < table + geometry.table_bytes and len(change.data) > 0:
                problems += _judge(number, change, level, unsynced, bit=bit)
                if level == "L2":
                    unsynced.add(table)
    return problems


def _judge(number: int, change: Write, level: str, unsynced: set[int], *, bit: bool) -> list[str]:
    """Judge one write to a table."""
    problems = [] if bit else [f"change {number}: {level} table written without NEED_CHECK"]
    if level == "L1":
        entries = set(np.frombuffer(change.data, "<u8").tolist())
        early = entries & unsynced
        if early:
            problems.append(f"change {number}: L1 entries before their tables: {sorted(early)}")
    return problems
