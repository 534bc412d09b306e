"""GUID partition tables (UEFI specification, chapter 5).

A table is stored twice, with checksums: the header of the primary table is in sector 1, and that of
the backup table in the last sector.  As in sfdisk, the backup is used if the primary is damaged.
"""

from __future__ import annotations

import codecs
import struct
import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from construct import (
    Bytes,
    Const,
    ConstructError,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
)

from qedfuse.partitions.mbr import parse_record
from qedfuse.partitions.partition import Partition, PartitionTable, explain_number

if TYPE_CHECKING:
    from qedfuse.partitions.partition import ReadDisk

SECTOR_SIZES: Final = (512, 4096)
"""Sector sizes in bytes, tried in this order until a table is found."""
_HEADER_BYTES: Final = 92
_MAX_TABLE_BYTES: Final = 1 << 20
"""Maximum length in bytes of all entries; the specification demands space for 16 KiB."""

_HEADER: Final[Any] = Struct(
    "signature" / Const(b"EFI PART"),
    "revision" / Int32ul,
    "header_bytes" / Int32ul,
    "header_crc" / Int32ul,
    Padding(4),
    "own_sector" / Int64ul,
    "other_sector" / Int64ul,
    "first_usable" / Int64ul,
    "last_usable" / Int64ul,
    "disk_uuid" / Bytes(16),
    "entries_sector" / Int64ul,
    "entry_count" / Int32ul,
    "entry_bytes" / Int32ul,
    "entries_crc" / Int32ul,
)
_ENTRY: Final = struct.Struct("<16s16sQQ8x72s")
"""An entry: type, UUID, first sector, last sector (inclusive), attributes, name in UTF-16LE.  It is
not a struct of construct, which takes more than 100 ms for the 8192 entries of a hostile table."""


class _Table(NamedTuple):
    """A header and its stored entries, both with correct checksums."""

    header: Any
    entries: bytes


async def read_gpt(read: ReadDisk, size: int) -> PartitionTable | None:
    """Return the GUID partition table of a disk of ``size`` bytes; None if there is no usable one.

    As in Linux, a GPT counts only if the first sector is a boot record with a protective entry.
    Otherwise a program may have replaced the GPT by a DOS table without erasing the GPT.

    Raises:
        QedError: The disk cannot be read.
    """
    if size < SECTOR_SIZES[0]:
        return None
    record = parse_record(await read(0, SECTOR_SIZES[0]))
    if record is None or not record.is_protective:
        return None
    for sector_bytes in SECTOR_SIZES:
        problems: list[str] = []
        last_sector = size // sector_bytes - 1
        table = await _read_table(read, 1, sector_bytes, last_sector)
        if table is None:
            table = await _read_table(read, last_sector, sector_bytes, last_sector)
            problems.append("the primary table is damaged, the backup is used")
        elif await _read_table(read, table.header.other_sector, sector_bytes, last_sector) is None:
            problems.append("the backup of the table is missing or damaged")
        if table is not None:
            return PartitionTable(
                "gpt",
                _uuid(table.header.disk_uuid),
                sector_bytes,
                tuple(_partitions(table.entries, sector_bytes, last_sector, problems)),
                tuple(problems),
            )
    return None


async def _read_table(
    read: ReadDisk, sector: int, sector_bytes: int, last_sector: int
) -> _Table | None:
    """Return the table whose header is in ``sector``; None if there is no usable one."""
    if not 1 <= sector <= last_sector:
        return None
    raw = await read(sector * sector_bytes, sector_bytes)
    try:
        header = _HEADER.parse(raw)
    except ConstructError:
        return None
    if not _HEADER_BYTES <= header.header_bytes <= sector_bytes:
        return None
    # The field that holds the checksum counts as zeros.
    checked = raw[:16] + bytes(4) + raw[20 : header.header_bytes]
    length = header.entry_count * header.entry_bytes
    sectors = -(-length // sector_bytes)
    if not (
        zlib.crc32(checked) == header.header_crc
        and header.own_sector == sector
        and header.first_usable <= header.last_usable <= last_sector
        and header.entry_bytes == _ENTRY.size
        and 0 < length <= _MAX_TABLE_BYTES
        and 1 <= header.entries_sector <= last_sector + 1 - sectors
    ):
        return None
    entries = await read(header.entries_sector * sector_bytes, length)
    if zlib.crc32(entries) != header.entries_crc:
        return None
    return _Table(header, bytes(entries))


def _partitions(
    entries: bytes, sector_bytes: int, last_sector: int, problems: list[str]
) -> list[Partition]:
    """Return the partitions in a list of entries; add to ``problems`` what is wrong with them."""
    found = []
    for number, entry in enumerate(_ENTRY.iter_unpack(entries), 1):
        kind, uuid, first, last, raw_name = entry
        if kind == bytes(16):
            continue
        problem = _explain_range(first, last, last_sector)
        if problem:
            problems.append(f"partition {number}: {problem}")
            continue
        problem = explain_number(number)
        if problem:
            problems.append(problem)
            break
        # `bytes.decode` would import the module of this codec.  A mount reads tables while it is
        # served, and must not import anything then.
        name = codecs.utf_16_le_decode(raw_name, "replace", True)[0].partition("\0")[0]  # noqa: FBT003  positional only
        start, length = first * sector_bytes, (last - first + 1) * sector_bytes
        found.append(Partition(number, start, length, _uuid(kind), _uuid(uuid), name))
    return found


def _explain_range(first: int, last: int, last_sector: int) -> str:
    """Return why a partition cannot have the sectors ``first`` to ``last``; empty if it can."""
    if last < first:
        return f"ends at sector {last}, before its first sector {first}"
    if not first:
        return "begins at sector 0, which holds the boot record"
    if first > last_sector:
        return f"begins outside of the disk, at sector {first}"
    if last > last_sector:
        return f"ends outside of the disk, at sector {last}, is left out"
    return ""


def _uuid(raw: bytes) -> str:
    """Return a stored UUID as sfdisk writes it; its first three fields are little-endian."""
    return str(UUID(bytes_le=raw)).upper()
