"""Partition tables that sfdisk would not write: damaged, hostile, or none at all."""

from __future__ import annotations

import struct
import sys
import zlib
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.partitions.table import read_table
from qedfuse.partitions.typenames import type_name

if TYPE_CHECKING:
    from qedfuse.partitions.partition import PartitionTable

SECTOR = 512
DISK = 4 << 20
NAME = "röt".encode("utf-16-le")
LINUX = bytes.fromhex("af3dc60f838472478e793d69d8477de4")


def boot_record(*entries: tuple[int, int, int, int], disk_id: int = 0x1234) -> bytes:
    """Return a boot record; an entry is boot flag, type, start and count in sectors."""
    packed = b"".join(struct.pack("<B3xB3xII", *entry) for entry in entries)
    return bytes(440) + struct.pack("<I2x", disk_id) + packed.ljust(64, b"\0") + b"\x55\xaa"


def disk_of(sectors: dict[int, bytes], size: int = DISK) -> bytearray:
    """Return a disk with this content, by sector."""
    disk = bytearray(size)
    for number, content in sectors.items():
        disk[number * SECTOR : number * SECTOR + len(content)] = content
    return disk


class Reader:
    """Reads a disk, and counts how often."""

    def __init__(self, disk: bytes | bytearray) -> None:
        self.disk = disk
        self.count = 0

    async def read(self, start: int, length: int) -> bytes:
        """Read a range, which must be within the disk."""
        assert 0 <= start < start + length <= len(self.disk)
        self.count += 1
        return bytes(self.disk[start : start + length])

    def table(self) -> PartitionTable | None:
        """Read the partition table."""
        return trio.run(read_table, self.read, len(self.disk))


def ranges(table: PartitionTable | None) -> list[tuple[int, int, int]]:
    """Return number, first sector and sectors of each partition."""
    assert table is not None
    return [(item.number, item.start // SECTOR, item.length // SECTOR) for item in table.partitions]


def gpt_header(
    own: int, other: int, entries: bytes, *, at: int, last: int, entry_bytes: int = 128
) -> bytes:
    """Return the header of a GPT with right checksums."""
    fields = (b"EFI PART", 0x10000, 92, 0, own, other, 1, last, bytes(16), at)
    tail = (len(entries) // 128, entry_bytes, zlib.crc32(entries))
    raw = bytearray(struct.pack("<8sIII4xQQQQ16sQIII", *fields, *tail))
    struct.pack_into("<I", raw, 16, zlib.crc32(raw))
    return bytes(raw)


def gpt_disk(*entries: tuple[int, int], damaged: tuple[int, ...] = (), **other: int) -> bytearray:
    """Return a disk with a GPT; an entry is its first and last sector."""
    last = DISK // SECTOR - 1
    packed = b"".join(
        struct.pack(
            "<16s16sQQQ72s", LINUX, bytes(15) + b"\1", first, end, 0, "röt".encode("utf-16-le")
        )
        for first, end in entries
    ).ljust(128 * 4, b"\0")
    disk = disk_of(
        {
            0: boot_record((0, 0xEE, 1, last)),
            1: gpt_header(1, last, packed, at=2, last=last, **other),
            2: packed,
            last - 4: packed,
            last: gpt_header(last, 1, packed, at=last - 4, last=last, **other),
        }
    )
    for sector in damaged:
        disk[sector * SECTOR + 16] ^= 1
    return disk


def test_the_longest_table_is_read_in_few_calls() -> None:
    """A hostile table of 8192 entries takes few calls of Python, because they block all disks."""
    last = DISK // SECTOR - 1
    packed = struct.pack("<16s16sQQQ72s", LINUX, bytes(16), 3000, 3001, 0, NAME) * 8192
    disk = disk_of(
        {
            0: boot_record((0, 0xEE, 1, last)),
            1: gpt_header(1, last, packed, at=2, last=last),
            2: packed,
            last: gpt_header(last, 1, packed, at=2, last=last),
        }
    )
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    reader = Reader(disk)
    sys.setprofile(count)
    try:
        table = reader.table()
    finally:
        sys.setprofile(None)
    assert table is not None
    assert len(table.partitions) == 255
    assert len(table.problems) == 1
    assert calls < 8192


def test_logical_partitions_follow_from_5() -> None:
    """Logical partitions are numbered from 5, and unused entries keep their number."""
    disk = disk_of(
        {
            0: boot_record((0x80, 0x83, 8, 8), (0, 0, 0, 0), (0, 5, 100, 100)),
            100: boot_record((0, 0x83, 4, 10), (0, 5, 30, 20)),
            130: boot_record((0, 0x82, 2, 18)),
        }
    )
    table = Reader(disk).table()
    assert ranges(table) == [(1, 8, 8), (3, 100, 100), (5, 104, 10), (6, 132, 18)]
    assert table is not None
    assert [item.is_container for item in table.partitions] == [False, True, False, False]
    assert not table.problems


@pytest.mark.parametrize("following", [0, 4, 30])
def test_a_loop_of_extended_partitions_ends(following: int) -> None:
    """A chain that leads back to one of its records ends there, and is reported."""
    disk = disk_of(
        {
            0: boot_record((0, 5, 100, 100)),
            100: boot_record((0, 0x83, 1, 1), (0, 5, 4, 20)),
            104: boot_record((0, 0x83, 1, 1), (0, 5, 30, 20)),
            130: boot_record((0, 0x83, 1, 1), (0, 5, following, 20)),
        }
    )
    reader = Reader(disk)
    table = reader.table()
    assert [number for number, _, _ in ranges(table)] == [1, 5, 6, 7]
    assert table is not None
    assert "leads to a loop" in table.problems[0]
    assert reader.count < 10


def test_a_long_chain_of_records_ends() -> None:
    """A chain of thousands of records is followed for a few hundred at most."""
    sectors = {0: boot_record((0, 5, 1, 8000))}
    for at in range(1, 8000):
        sectors[at] = boot_record((0, 0, 0, 0), (0, 5, at, 1))
    reader = Reader(disk_of(sectors))
    table = reader.table()
    assert table is not None
    assert "too long" in table.problems[0]
    assert reader.count < 400


def test_records_with_and_without_partitions_are_limited() -> None:
    """A chain in which one of fifty records has a partition is followed for 512 records at most."""
    sectors = {0: boot_record((0, 5, 1, 8000))}
    for at in range(1, 8000):
        entry = (0, 0x83, 1, 1) if at % 50 == 0 else (0, 0, 0, 0)
        sectors[at] = boot_record(entry, (0, 5, at, 1))
    reader = Reader(disk_of(sectors))
    table = reader.table()
    assert table is not None
    assert "too long" in table.problems[0]
    assert reader.count == 2 + 512  # the master boot record for each kind of table, and the chain


@pytest.mark.parametrize(
    ("count", "first_count"), [(250, 1), (251, 1), (252, 1), (252, 2), (253, 1)]
)
def test_the_highest_number_is_255(count: int, first_count: int) -> None:
    """No logical partition has a number above 255, also if two share the last record.

    The first record has one or two partitions, and each other record two.
    """
    sectors = {0: boot_record((0, 5, 1, 8000))}
    at, left, logical = 1, count, first_count
    while left:
        logical = min(logical, left)
        left -= logical
        entries = [(0, 0x83, 1000, 1)] * logical + [(0, 0, 0, 0)] * (2 - logical)
        sectors[at] = boot_record(*entries, *[(0, 5, at, 1)] * bool(left))
        at, logical = at + 1, 2
    table = Reader(disk_of(sectors)).table()
    assert table is not None
    numbers = [item.number for item in table.partitions]
    assert numbers == [1, *range(5, min(5 + count, 256))]
    problem = "partition 256: the highest number in Linux is 255"
    assert table.problems == ((problem,) if count > 251 else ())


def test_only_the_first_extended_partition_counts() -> None:
    """As for sfdisk, logical partitions are those of the first extended partition, if any."""
    disk = disk_of(
        {
            0: boot_record((0, 5, 100, 50), (0, 5, 200, 50)),
            100: boot_record(),
            200: boot_record((0, 0x83, 1, 5)),
        }
    )
    assert ranges(Reader(disk).table()) == [(1, 100, 50), (2, 200, 50)]


def test_partitions_outside_of_the_disk_are_left_out() -> None:
    """A partition ends with the disk at the latest, and one that begins after it is none."""
    end = DISK // SECTOR
    disk = disk_of(
        {
            0: boot_record(
                (0, 0x83, end - 2, 100), (0, 0x83, end, 1), (0, 0x83, 2**32 - 1, 2**32 - 1),
                (0, 5, 10, 2**32 - 1),
            ),
            10: boot_record((0, 0x83, 2**32 - 1, 5), (0, 5, 2**32 - 1, 5)),
        }
    )  # fmt: skip
    table = Reader(disk).table()
    assert ranges(table) == [(1, end - 2, 2), (4, 10, end - 10)]
    assert table is not None
    assert len(table.problems) == 6


def test_a_partition_cannot_begin_with_the_table() -> None:
    """An entry with sector 0 is left out, and the problem does not say that it is outside."""
    disk = disk_of({0: boot_record((0, 0x83, 0, 100), (0, 0x83, 100, 50))})
    table = Reader(disk).table()
    assert ranges(table) == [(2, 100, 50)]
    assert table is not None
    assert table.problems == ("partition 1: begins at sector 0, which holds the partition table",)


@pytest.mark.parametrize(
    "disk",
    [
        b"",
        bytes(511),
        bytes(SECTOR),
        boot_record(disk_id=0),
        boot_record((1, 0x83, 1, 1)),
        boot_record((0, 0xEE, 1, 1)),
        b"\xff" * 510 + b"\x55\xaa",
    ],
)
def test_a_disk_without_a_table(disk: bytes) -> None:
    """A disk that is too short or blank, or begins with another boot sector, has no table."""
    assert Reader(disk).table() is None


def test_a_gpt_has_names_and_uuids() -> None:
    """A partition of a GPT has the type, UUID and name that the table gives."""
    table = Reader(gpt_disk((100, 199), (200, 200))).table()
    assert ranges(table) == [(1, 100, 100), (2, 200, 1)]
    assert table is not None
    assert (table.scheme, table.problems) == ("gpt", ())
    first = table.partitions[0]
    assert type_name("gpt", first.type) == "Linux filesystem"
    assert first.uuid == "00000000-0000-0000-0000-000000000001"
    assert first.name == "röt"


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        ((1,), "the primary table is damaged, the backup is used"),
        ((2,), "the primary table is damaged, the backup is used"),
        ((DISK // SECTOR - 1,), "the backup of the table is missing or damaged"),
    ],
)
def test_one_damaged_gpt_does_not_matter(damaged: tuple[int, ...], problem: str) -> None:
    """A GPT is read from the backup if the primary one is damaged, and either is reported."""
    table = Reader(gpt_disk((100, 199), damaged=damaged)).table()
    assert ranges(table) == [(1, 100, 100)]
    assert table is not None
    assert table.problems == (problem,)


def test_two_damaged_gpts_are_none() -> None:
    """A disk whose both GPTs are damaged has no table: the protective entry is no partition."""
    assert Reader(gpt_disk((100, 199), damaged=(1, DISK // SECTOR - 1))).table() is None


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ((0, 5), "begins at sector 0, which holds the boot record"),
        ((200, 100), "ends at sector 100, before its first sector 200"),
        ((9000, 0), "ends at sector 0, before its first sector 9000"),
        ((8000, 8192), "ends outside of the disk, at sector 8192, is left out"),
        ((1, 2**64 - 1), f"ends outside of the disk, at sector {2**64 - 1}, is left out"),
        ((8192, 8192), "begins outside of the disk, at sector 8192"),
        ((2**63, 2**63 + 5), f"begins outside of the disk, at sector {2**63}"),
    ],
)
def test_entries_of_a_gpt_outside_of_the_disk_are_left_out(
    entry: tuple[int, int], problem: str
) -> None:
    """An entry that does not lie within the disk is no partition, and the problem says why."""
    table = Reader(gpt_disk((100, 199), entry)).table()
    assert ranges(table) == [(1, 100, 100)]
    assert table is not None
    assert table.problems == (f"partition 2: {problem}",)


def test_a_gpt_with_other_entries_is_none() -> None:
    """Entries of another length than 128 bytes are not read, as in Linux and sfdisk."""
    assert Reader(gpt_disk((100, 199), entry_bytes=64)).table() is None


def test_a_hybrid_gpt_is_a_gpt() -> None:
    """With a protective entry and others in the boot record, the GPT counts."""
    disk = gpt_disk((100, 199))
    disk[:SECTOR] = boot_record((0, 0xEE, 1, 99), (0x80, 0x83, 100, 50))
    assert ranges(Reader(disk).table()) == [(1, 100, 100)]
