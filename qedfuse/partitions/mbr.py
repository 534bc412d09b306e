"""DOS partition tables: the master boot record, and the chain of extended boot records.

Partitions are numbered as by Linux (``block/partitions/msdos.c``): the four entries of the master
boot record are 1 to 4, even if an entry is empty, and logical partitions follow from 5 on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from construct import Array, Bytes, Const, ConstructError, Int8ul, Int32ul, Padding, Struct

from qedfuse.partitions.partition import Partition, PartitionTable, explain_number

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.partitions.partition import ReadDisk

SECTOR_BYTES: Final = 512
"""Length in bytes of a boot record, and of the sectors in which a DOS table counts."""
PROTECTIVE_TYPE: Final = 0xEE
"""Type of the entry that covers a disk with a GPT, so that older programs find no free space."""
_EXTENDED_TYPES: Final = (0x05, 0x0F, 0x85)
_MAX_EMPTY_RECORDS: Final = 100
"""Maximum number of consecutive records without a partition, as in Linux."""
_MAX_RECORDS: Final = 512
"""Maximum number of extended boot records that are read from a disk."""

_ENTRY: Final[Any] = Struct(
    "boot" / Int8ul,
    Padding(3),  # the first sector as cylinder, head and sector, which no program uses any more
    "type" / Int8ul,
    Padding(3),
    "start" / Int32ul,
    "length" / Int32ul,
)
_RECORD: Final[Any] = Struct(
    "code" / Bytes(440),
    "id" / Int32ul,
    Padding(2),
    "entries" / Array(4, _ENTRY),
    "magic" / Const(b"\x55\xaa"),
)


class Entry(NamedTuple):
    """An entry of a boot record.

    Attributes:
        boot: 0x80 if the partition is bootable, otherwise 0.
        type: The type of the partition; 0 for an unused entry.
        start: The first sector, counted from the beginning of the disk; see `_logical` for extended
            records.
        length: Number of sectors; 0 for an unused entry.
    """

    boot: int
    type: int
    start: int
    length: int

    @property
    def is_extended(self) -> bool:
        """Whether the entry describes a container of logical partitions."""
        return self.type in _EXTENDED_TYPES and self.length > 0


class Record(NamedTuple):
    """A boot record.

    Attributes:
        id: The disk's identifier; without meaning in an extended boot record.
        entries: The four entries.
    """

    id: int
    entries: tuple[Entry, ...]

    @property
    def is_protective(self) -> bool:
        """Whether an entry protects a GPT."""
        return any(entry.type == PROTECTIVE_TYPE for entry in self.entries)


def parse_record(sector: bytes) -> Record | None:
    """Return the boot record in the first 512 bytes of a sector; None if there is none.

    The boot sector of a file system can have the same magic number, with code in place of entries.
    So the result is also None if an entry begins with a byte other than 0 and 0x80.
    """
    try:
        found = _RECORD.parse(sector)
    except ConstructError:
        return None
    entries = tuple(Entry(item.boot, item.type, item.start, item.length) for item in found.entries)
    if any(entry.boot & 0x7F for entry in entries):
        return None
    return Record(found.id, entries)


async def read_mbr(read: ReadDisk, size: int) -> PartitionTable | None:
    """Return the DOS partition table of a disk of ``size`` bytes; None if there is none.

    Returns None also if the first sector protects a GPT.  A boot record with neither partitions nor
    an identifier does not count, because the boot sector of a file system can look like this.

    Raises:
        QedError: The disk cannot be read.
    """
    if size < SECTOR_BYTES:
        return None
    record = parse_record(await read(0, SECTOR_BYTES))
    if record is None or record.is_protective:
        return None
    used = [entry for entry in record.entries if entry.length and entry.type]
    if not used and not record.id:
        return None
    problems: list[str] = []
    partitions: list[Partition] = []
    logical: list[Partition] = []
    has_extended = False
    sectors = size // SECTOR_BYTES
    for number, entry in enumerate(record.entries, 1):
        if not entry.length or not entry.type:
            continue
        found = _partition(number, entry, entry.start, sectors, problems)
        if found is not None:
            partitions.append(found)
            # Like sfdisk, and unlike Linux, use only the first extended partition.
            if entry.is_extended and not has_extended:
                has_extended = True
                chain = _logical(read, entry, sectors, problems)
                logical += [partition async for partition in chain]
    return PartitionTable(
        "dos", f"0x{record.id:08x}", SECTOR_BYTES, (*partitions, *logical), tuple(problems)
    )


def _partition(
    number: int, entry: Entry, start: int, sectors: int, problems: list[str]
) -> Partition | None:
    """Return the partition of an entry, cut at the end of the disk.

    Returns None if it begins at sector 0 or outside of the disk.  ``start`` counts from the
    beginning of the disk.  A fault is added to ``problems``.
    """
    if not start:
        problems.append(f"partition {number}: begins at sector 0, which holds the partition table")
        return None
    if start >= sectors:
        problems.append(f"partition {number}: begins outside of the disk, at sector {start}")
        return None
    length = entry.length
    if start + length > sectors:
        problems.append(f"partition {number}: ends after the end of the disk, is cut there")
        length = sectors - start
    return Partition(
        number,
        start * SECTOR_BYTES,
        length * SECTOR_BYTES,
        f"{entry.type:x}",
        bootable=bool(entry.boot),
        is_container=entry.is_extended,
    )


async def _logical(
    read: ReadDisk, extended: Entry, sectors: int, problems: list[str]
) -> AsyncIterator[Partition]:
    """Yield the logical partitions in an extended partition.

    Each record has an entry for one logical partition, relative to this record, and an entry for
    the next record, relative to the extended partition.  Errors are added to ``problems``.  An
    error in the chain of records, or a partition number above the maximum, ends the iteration.
    """
    sector = extended.start
    seen: set[int] = set()
    number = 5
    empty_records = 0
    while empty_records < _MAX_EMPTY_RECORDS and len(seen) < _MAX_RECORDS:
        if sector in seen or sector >= sectors:
            target = "a loop" if sector in seen else f"sector {sector} outside of the disk"
            problems.append(f"extended partition: the chain of records leads to {target}")
            return
        seen.add(sector)
        record = parse_record(await read(sector * SECTOR_BYTES, SECTOR_BYTES))
        if record is None:
            problems.append(f"extended partition: sector {sector} is not a boot record")
            return
        empty_records += 1
        for entry in record.entries[:2]:
            if entry.length and entry.type and not entry.is_extended:
                problem = explain_number(number)
                if problem:
                    problems.append(problem)
                    return
                found = _partition(number, entry, sector + entry.start, sectors, problems)
                if found is not None:
                    yield found
                number += 1
                empty_records = 0
        next_record = next((entry for entry in record.entries if entry.is_extended), None)
        if next_record is None:
            return
        sector = extended.start + next_record.start
    problems.append("extended partition: the chain of records is too long")
