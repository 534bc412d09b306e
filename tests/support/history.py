"""What a disk was asked to do and when, and so what a crash may have left of it (rule D6).

Every sector of the tests' disks holds one number, repeated: 0 for zeros, and otherwise
a number that says which write, or which base, put it there and at which offset.  A
sector that holds another sector's number, or a mixture, is a third thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.ondisk.constants import ZERO
from tests.support.crashrecording import MIXED, WORDS
from tests.support.disks import header_of
from tests.support.hostfiles import SECTOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.disk import Disk
    from tests.support.hostfiles import RecordingFile

    Stamps = NDArray[np.uint64]

NEVER: Final = 1 << 62
_PLACE_BITS: Final = 24
_BASE_BITS: Final = 56


def write_stamps(number: int, first: int, count: int) -> Stamps:
    """Give what each sector of a write holds: the write's number and the sector's."""
    return np.arange(first, first + count, dtype=np.uint64) + np.uint64(number << _PLACE_BITS)


def base_stamps(level: int, first: int, count: int) -> Stamps:
    """Give what each sector of a base holds; levels count from 1."""
    return np.arange(first, first + count, dtype=np.uint64) + np.uint64(level << _BASE_BITS)


def stamped(numbers: Stamps) -> bytes:
    """Make sectors that hold the numbers."""
    return np.repeat(numbers, WORDS).astype("<u8").tobytes()


def stamps(content: bytes | bytearray) -> Stamps:
    """Read the numbers that sectors hold, or `MIXED`."""
    words = np.frombuffer(content, "<u8").reshape(-1, WORDS)
    return np.where((words == words[:, :1]).all(axis=1), words[:, 0], np.uint64(MIXED))


def describe(stamp: int) -> str:
    """Say in words what a sector holds."""
    if stamp in (0, MIXED):
        return "a mixture" if stamp else "zeros"
    if stamp >> _BASE_BITS:
        return f"base {stamp >> _BASE_BITS}'s sector {stamp & ((1 << _BASE_BITS) - 1)}"
    return f"write {stamp >> _PLACE_BITS}'s sector {stamp & ((1 << _PLACE_BITS) - 1)}"


def disk_stamps(image: bytes | bytearray, below: Stamps) -> Stamps:
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
class Request:
    """A request: when it began and ended, in the order of requests and in host changes.

    Attributes:
        first: The first sector that it changes.
        last: The sector past the last one.
        number: What a write put there, 0 for a discard, which leaves zeros.
        size: What a resize made of the disk, in bytes.
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
        """Tell what a sector of this change holds when it is over."""
        return (self.number << _PLACE_BITS) + sector if self.number else 0


@dataclass(frozen=True)
class AllowedContents:
    """What each sector of the disk may hold after a crash.

    Attributes:
        numbers: A row for each sector; the numbers in it repeat where there are few.
    """

    numbers: Stamps

    def refuses(self, sectors: NDArray[np.intp], found: Stamps) -> NDArray[np.bool_]:
        """Tell which of some sectors hold something that they must not."""
        allowed: NDArray[np.bool_] = (self.numbers[sectors] == found[..., np.newaxis]).any(axis=-1)
        return ~allowed


class History:
    """Carries out requests on a disk and remembers them.

    Reads are judged at once: what is under way must not be disturbed by what frees and
    reuses clusters.
    """

    def __init__(self, file: RecordingFile, below: Stamps, numbered_from: int = 0) -> None:
        """Remember what happens to an image in ``file`` whose base holds ``below``.

        The first write has the number after ``numbered_from``.
        """
        self._numbered_from = numbered_from
        self.file = file
        self.below = below
        self.changes: list[Request] = []
        self.flushes: list[Request] = []
        self.resizes: list[Request] = []
        self.misread: list[str] = []
        self.disk: Disk | None = None
        self._clock = 0
        self._allowed: dict[int, AllowedContents] = {}
        self._by_sector: dict[int, list[Request]] = {}
        self._first = disk_stamps(file.initial, below)

    @property
    def _open(self) -> Disk:
        assert self.disk is not None
        return self.disk

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
        """Write ``count`` sectors with numbers of their own."""
        event = self._change(first, count)
        event.number = self._numbered_from + len(self.changes)
        data = stamped(write_stamps(event.number, first, count))
        if not self._open.try_write(first * SECTOR, data):
            assert await self._open.write(first * SECTOR, data) == len(data)
        self._end(event)

    async def write_zeros(self, first: int, count: int) -> None:
        """Write ``count`` sectors of zeros."""
        event = self._change(first, count)
        assert await self._open.write(first * SECTOR, bytes(count * SECTOR)) == count * SECTOR
        self._end(event)

    async def discard(self, first: int, count: int) -> None:
        """Discard ``count`` sectors."""
        event = self._change(first, count)
        await self._open.discard(first * SECTOR, count * SECTOR)
        self._end(event)

    async def flush(self) -> None:
        """Flush."""
        event = self._begin(self.flushes)
        await self._open.flush()
        self._end(event)

    async def resize(self, size: int) -> None:
        """Grow the disk to ``size`` bytes."""
        event = self._begin(self.resizes)
        event.size = size
        await self._open.resize(size)
        self._end(event)

    async def read(self, first: int, count: int) -> None:
        """Read sectors, and judge what they hold by what was under way."""
        began = self._clock = self._clock + 1
        data = await self._open.read(first * SECTOR, count * SECTOR)
        for sector, found in enumerate(stamps(data).tolist(), first):
            allowed = self._may_hold(sector, began)
            if found not in allowed:
                self.misread.append(f"sector {sector} read as {describe(found)}")

    def closed(self) -> None:
        """Note that the disk has been closed without an error: all of it is durable."""
        self._end(self._begin(self.flushes))

    def _may_hold(self, sector: int, since: int) -> set[int]:
        """Tell what a sector may hold, if all that had ended by ``since`` has happened.

        Whatever was over before the newest of those began is gone.
        """
        events = self._by_sector.get(sector, ())
        newest = max((event.began for event in events if event.ended < since), default=0)
        numbers = {event.leaves(sector) for event in events if event.ended > newest}
        return numbers if newest else numbers | {self.original(sector)}

    def original(self, sector: int) -> int:
        """Tell what a sector held before the first change."""
        return int(self._first[sector]) if sector < len(self._first) else 0

    @property
    def sectors(self) -> int:
        """The most sectors that the disk ever had."""
        return max([len(self._first), *(event.size // SECTOR for event in self.resizes)])

    def flushed(self, count: int) -> int:
        """Tell which requests are durable after ``count`` host changes: those over by then."""
        return max((e.began for e in self.flushes if e.ended_at <= count), default=0)

    def least_size(self, count: int) -> int:
        """Tell how large the disk is at least after ``count`` host changes, in bytes."""
        sizes = [e.size for e in self.resizes if e.ended_at <= count]
        return max([len(self._first) * SECTOR, *sizes])

    def promises(self, count: int) -> tuple[int, int]:
        """Tell apart the moments at which different things had been promised."""
        return self.flushed(count), self.least_size(count)

    def allowed(self, flushed: int) -> AllowedContents:
        """Tell what each sector may hold once everything over by ``flushed`` is durable."""
        known = self._allowed.get(flushed)
        if known is None:
            several = {s: sorted(self._may_hold(s, flushed)) for s in self._by_sector}
            most = max(map(len, several.values()), default=1)
            numbers = np.zeros((self.sectors, most), np.uint64)
            numbers[: len(self._first)] = self._first[:, np.newaxis]
            for sector, choice in several.items():
                numbers[sector] = choice + choice[:1] * (most - len(choice))
            known = self._allowed[flushed] = AllowedContents(numbers)
        return known
