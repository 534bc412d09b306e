"""The requests to a disk, from which follows what the disk may hold after a crash (rule D6).

Every sector of these disks holds one 64-bit *stamp*, repeated: 0 for zeros, otherwise the number
of the write, or of the base, that put it there, and the number of the sector.  So a sector with
the content of another sector, or of two writes, is detected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.ondisk.constants import ZERO
from tests.support.crashrecording import MIXED, WORDS_PER_SECTOR
from tests.support.disks import header_of
from tests.support.hostfiles import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.disk import Disk
    from tests.support.hostfiles import RecordingFile

    Stamps = NDArray[np.uint64]

NEVER: Final = 1 << 62
"""The time that stands for the end of a request that has not ended."""
_WRITE_SHIFT: Final = 24
"""The bits of a stamp below this one are the sector's number, those above the write's."""
_BASE_SHIFT: Final = 56
"""The bits of a stamp from this one on are the number of a base; 0 for a write."""


def write_stamps(number: int, first: int, count: int) -> Stamps:
    """Return the stamps of the sectors of write ``number``."""
    return np.arange(first, first + count, dtype=np.uint64) + np.uint64(number << _WRITE_SHIFT)


def base_stamps(level: int, first: int, count: int) -> Stamps:
    """Return the stamps of sectors of the base at ``level``, from 1."""
    return np.arange(first, first + count, dtype=np.uint64) + np.uint64(level << _BASE_SHIFT)


def stamped(numbers: Stamps) -> bytes:
    """Return the bytes of sectors with these stamps."""
    return np.repeat(numbers, WORDS_PER_SECTOR).astype("<u8").tobytes()


def stamps(content: bytes | bytearray) -> Stamps:
    """Return the stamp of each sector, `MIXED` for one that does not repeat one word."""
    words = np.frombuffer(content, "<u8").reshape(-1, WORDS_PER_SECTOR)
    return np.where((words == words[:, :1]).all(axis=1), words[:, 0], np.uint64(MIXED))


def describe(stamp: int) -> str:
    """Return in words what a sector with this stamp holds."""
    if stamp in (0, MIXED):
        return "a mixture" if stamp else "zeros"
    if stamp >> _BASE_SHIFT:
        return f"base {stamp >> _BASE_SHIFT}'s sector {stamp & ((1 << _BASE_SHIFT) - 1)}"
    return f"write {stamp >> _WRITE_SHIFT}'s sector {stamp & ((1 << _WRITE_SHIFT) - 1)}"


def disk_stamps(image: bytes | bytearray, below: Stamps) -> Stamps:
    """Return the stamps on the disk of an image whose base has the stamps ``below``.

    The function does not use the code under test.  The tables must be sound.
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
            count = max(0, min(per_cluster, size - start))
            first = value // SECTOR
            result[start : start + count] = 0 if value == ZERO else sectors[first : first + count]
    return result


def _entries(image: bytes | bytearray, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the index and the value of each entry of a table that is not 0."""
    table = np.frombuffer(bytes(image[offset : offset + length]), "<u8")
    for index in np.flatnonzero(table).tolist():
        yield index, int(table[index])


@dataclass
class Request:
    """A request that changes the disk, and when it began and ended.

    Attributes:
        began: When it began, on the clock of the history.
        began_at: How many changes the host's file had then.
        ended: When it ended; `NEVER` before that.
        ended_at: How many changes the host's file had then.
        first: The first sector that it changes.
        last: The sector past the last one.
        number: The number of a write; 0 for a discard or zeros.
        size: The new size of the disk in bytes, for a resize.
    """

    began: int
    began_at: int
    ended: int = NEVER
    ended_at: int = NEVER
    first: int = 0
    last: int = 0
    number: int = 0
    size: int = 0

    def leaves(self, sector: int) -> int:
        """Return the stamp that a sector of the request has after the request."""
        return (self.number << _WRITE_SHIFT) + sector if self.number else 0


@dataclass(frozen=True)
class AllowedContents:
    """The stamps that each sector of the disk may have after a crash.

    Attributes:
        stamps: A row for each sector; all rows have the same length, so some repeat a stamp.
    """

    stamps: Stamps

    def refuses(self, sectors: NDArray[np.intp], found: Stamps) -> NDArray[np.bool_]:
        """Return for each of some sectors whether the stamp ``found`` there is not allowed."""
        allowed: NDArray[np.bool_] = (self.stamps[sectors] == found[..., np.newaxis]).any(axis=-1)
        return ~allowed


class History:
    """Makes requests on a disk, and records them.

    Its clock goes on by one when a request begins or ends.  Reads are judged immediately: they
    must not see clusters that were freed and used again meanwhile.

    Attributes:
        file: The host's file, which records its changes.
        below: The stamps of the base's disk.
        changes: All writes and discards.
        flushes: All flushes, and closes that succeeded.
        resizes: All resizes.
        misread: What reads returned and must not.
        fast_writes: How many writes the fast path took.
        fast_flushes: How many flushes the fast path made with a datasync.
    """

    def __init__(self, file: RecordingFile, below: Stamps, numbered_from: int = 0) -> None:
        """Record the requests on the image in ``file``, whose base has the stamps ``below``.

        Call `attach` with the opened disk before the first request.  The first write has the
        number after ``numbered_from``.
        """
        self._numbered_from = numbered_from
        self.file = file
        self.below = below
        self.changes: list[Request] = []
        self.flushes: list[Request] = []
        self.resizes: list[Request] = []
        self.misread: list[str] = []
        self.fast_writes = 0
        self.fast_flushes = 0
        self._disk: Disk | None = None
        self._clock = 0
        self._allowed: dict[int, AllowedContents] = {}
        self._by_sector: dict[int, list[Request]] = {}
        self._first = disk_stamps(file.initial, below)

    def attach(self, disk: Disk) -> None:
        """Send the requests from now on to ``disk``, which is open on the file."""
        self._disk = disk

    @property
    def disk(self) -> Disk:
        """The disk that requests go to."""
        assert self._disk is not None, "attach a disk first"
        return self._disk

    def _begin(self, events: list[Request]) -> Request:
        self._clock += 1
        event = Request(self._clock, len(self.file.changes))
        events.append(event)
        return event

    def _end(self, event: Request) -> None:
        self._clock += 1
        event.ended, event.ended_at = self._clock, len(self.file.changes)

    def _change(self, first: int, count: int) -> Request:
        event = self._begin(self.changes)
        event.first, event.last = first, first + count
        for sector in range(first, first + count):
            self._by_sector.setdefault(sector, []).append(event)
        return event

    async def write(self, first: int, count: int) -> None:
        """Write ``count`` sectors with new stamps, by the fast path where it takes the write."""
        event = self._change(first, count)
        event.number = self._numbered_from + len(self.changes)
        data = stamped(write_stamps(event.number, first, count))
        if self.disk.try_write(first * SECTOR, data):
            self.fast_writes += 1
        else:
            assert await self.disk.write(first * SECTOR, data) == len(data)
        self._end(event)

    async def write_zeros(self, first: int, count: int) -> None:
        """Write ``count`` sectors of zeros."""
        event = self._change(first, count)
        assert await self.disk.write(first * SECTOR, bytes(count * SECTOR)) == count * SECTOR
        self._end(event)

    async def discard(self, first: int, count: int) -> None:
        """Discard ``count`` sectors."""
        event = self._change(first, count)
        await self.disk.discard(first * SECTOR, count * SECTOR)
        self._end(event)

    async def flush(self) -> None:
        """Flush the disk, by the fast path where it suffices."""
        event = self._begin(self.flushes)
        changes = len(self.file.changes)
        if self.disk.try_flush():
            self.fast_flushes += len(self.file.changes) > changes
        else:
            await self.disk.flush()
        self._end(event)

    async def resize(self, size: int) -> None:
        """Grow the disk to ``size`` bytes."""
        event = self._begin(self.resizes)
        event.size = size
        await self.disk.grow(size)
        self._end(event)

    async def read(self, first: int, count: int) -> None:
        """Read sectors; record each with a stamp that no request so far can have left there."""
        began = self._clock = self._clock + 1
        data = await self.disk.read(first * SECTOR, count * SECTOR)
        for sector, found in enumerate(stamps(data).tolist(), first):
            allowed = self._may_hold(sector, began)
            if found not in allowed:
                self.misread.append(f"sector {sector} read as {describe(found)}")

    def closed(self) -> None:
        """Record that the disk was closed without an error, so that everything is durable."""
        self._end(self._begin(self.flushes))

    def _may_hold(self, sector: int, since: int) -> set[int]:
        """Return the stamps that a sector may have if requests that ended by ``since`` took effect.

        The newest such request has overwritten every request that ended before it began.
        """
        events = self._by_sector.get(sector, ())
        newest = max((event.began for event in events if event.ended < since), default=0)
        numbers = {event.leaves(sector) for event in events if event.ended > newest}
        return numbers if newest else numbers | {self.original(sector)}

    def original(self, sector: int) -> int:
        """Return the stamp of a sector before the first request."""
        return int(self._first[sector]) if sector < len(self._first) else 0

    @property
    def sectors(self) -> int:
        """The largest number of sectors that the disk ever had."""
        return max([len(self._first), *(event.size // SECTOR for event in self.resizes)])

    def flushed(self, count: int) -> int:
        """Return until when requests are durable after ``count`` changes of the host's file.

        That is the clock at the beginning of the last flush that had ended by then.
        """
        return max((e.began for e in self.flushes if e.ended_at <= count), default=0)

    def least_size(self, count: int) -> int:
        """Return the smallest allowed size of the disk, in bytes, after ``count`` changes."""
        sizes = [e.size for e in self.resizes if e.ended_at <= count]
        return max([len(self._first) * SECTOR, *sizes])

    def promises(self, count: int) -> tuple[int, int]:
        """Return `flushed` and `least_size`: all that was promised after ``count`` changes."""
        return self.flushed(count), self.least_size(count)

    def allowed(self, flushed: int) -> AllowedContents:
        """Return what sectors may hold after a crash, if requests up to ``flushed`` are durable."""
        allowed = self._allowed.get(flushed)
        if allowed is None:
            several = {s: sorted(self._may_hold(s, flushed)) for s in self._by_sector}
            width = max(map(len, several.values()), default=1)
            rows = np.zeros((self.sectors, width), np.uint64)
            rows[: len(self._first)] = self._first[:, np.newaxis]
            for sector, choice in several.items():
                rows[sector] = choice + choice[:1] * (width - len(choice))
            allowed = self._allowed[flushed] = AllowedContents(rows)
        return allowed
