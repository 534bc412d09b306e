"""Partition tables: whatever a disk holds, partitions lie inside it, and little is read.

An input is one byte of flags, the size of the disk in sectors (four bytes), and patches: a sector
(four bytes, counted from the end if the highest bit is set), an offset in it (two bytes), the
length, the bytes.  The lowest flag makes the checksums of GUID partition tables right.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import trio

from qedfuse.partitions.gpt import SECTOR_SIZES
from qedfuse.partitions.table import read_table
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.target import Target

_SECTOR: Final = 512
_MAX_READS: Final = 26_000 + 16
_MAX_READ_BYTES: Final = _MAX_READS * _SECTOR + (5 << 20)
_FROM_END: Final = 1 << 31


class _Disk:
    """A disk with a few bytes that are not zero, which counts what is read."""

    def __init__(self, data: bytes) -> None:
        drawn = Drawn(data)
        flags = drawn.number()
        self.size = drawn.number(4) * _SECTOR + (flags >> 1) % _SECTOR
        self._sectors: dict[int, bytearray] = {}
        while drawn:
            sector, offset = drawn.number(4), drawn.number(2) % _SECTOR
            if sector & _FROM_END:
                sector = self.size // _SECTOR - (sector & ~_FROM_END)
            self._put(sector * _SECTOR + offset, drawn.string())
        self.reads = self.read_bytes = 0
        if flags & 1:
            for sector_bytes in SECTOR_SIZES:
                last = self.size // sector_bytes - 1
                for sector in (1, last):
                    self._correct(sector, sector_bytes)

    def _put(self, start: int, data: bytes) -> None:
        for number, byte in enumerate(data, start):
            if 0 <= number < self.size:
                block = self._sectors.setdefault(number // _SECTOR, bytearray(_SECTOR))
                block[number % _SECTOR] = byte

    def get(self, start: int, length: int) -> bytes:
        """Return a range of the disk."""
        first, last = start // _SECTOR, (start + length - 1) // _SECTOR
        empty = bytes(_SECTOR)
        blocks = b"".join(self._sectors.get(number, empty) for number in range(first, last + 1))
        return blocks[start - first * _SECTOR :][:length]

    def _correct(self, sector: int, sector_bytes: int) -> None:
        """Correct the checksums of a GPT, whose header is in a sector."""
        at = sector * sector_bytes
        if sector < 1 or self.get(at, 8) != b"EFI PART":
            return
        (header_bytes,) = struct.unpack("<I", self.get(at + 12, 4))
        entries, count, each = struct.unpack("<QII", self.get(at + 72, 16))
        start, length = entries * sector_bytes, count * each
        if start + length <= self.size and length <= 1 << 16:
            self._put(at + 88, zlib.crc32(self.get(start, length)).to_bytes(4, "little"))
        self._put(at + 16, bytes(4))
        crc = zlib.crc32(self.get(at, min(header_bytes, sector_bytes)))
        self._put(at + 16, crc.to_bytes(4, "little"))

    async def read(self, start: int, length: int) -> bytes:
        """Return a range of the disk, which must lie inside it."""
        assert 0 <= start <= start + length <= self.size, "a read outside of the disk"
        assert length > 0
        self.reads += 1
        self.read_bytes += length
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self.get(start, length)


def check(data: bytes) -> None:
    """Read the partition table of a disk."""
    disk = _Disk(data)
    table = trio.run(read_table, disk.read, disk.size)
    assert disk.reads <= _MAX_READS, f"{disk.reads} reads"
    assert disk.read_bytes <= _MAX_READ_BYTES, f"{disk.read_bytes} bytes were read"
    if table is None:
        return
    numbers = [partition.number for partition in table.partitions]
    assert len(set(numbers)) == len(numbers), "two partitions with one number"
    for partition in table.partitions:
        assert 1 <= partition.number <= 255
        assert 0 < partition.start < partition.start + partition.length <= disk.size
    assert all(problem.isprintable() for problem in table.problems)


def _patch(sector: int, offset: int, data: bytes) -> bytes:
    """Return a patch of an input."""
    return struct.pack("<IHB", sector, offset, len(data)) + data


def _entry(kind: int, start: int, length: int) -> bytes:
    """Return an entry of a boot record."""
    return struct.pack("<B3xB3xII", 0, kind, start, length)


def _gpt(sector: int, own: int, other: int, entries: int, sectors: int) -> bytes:
    """Return the header of a GPT with 4 entries, without checksums."""
    head = struct.pack("<8sII8xQQQQ16sQIII", b"EFI PART", 1 << 16, 92, own, other, 34,
                       sectors - 34, bytes(range(16)), entries, 4, 128, 0)  # fmt: skip
    return _patch(sector, 0, head)


def seeds() -> list[bytes]:
    """Return a DOS table, one with logical partitions, a GPT, and a GPT in its backup only."""
    magic = _patch(0, 510, b"\x55\xaa")
    size = struct.pack("<BI", 0, 1 << 16)
    dos = size + magic + _patch(0, 440, b"\1\2\3\4")
    dos += _patch(0, 446, _entry(0x83, 2048, 4096) + _entry(5, 8192, 16384))
    logical = dos + b"".join(
        _patch(8192 + at, 446, _entry(0x83, 63, 100) + _entry(5, at + 256, 512))
        + _patch(8192 + at, 510, b"\x55\xaa")
        for at in (0, 256)
    )
    count = 1 << 16
    entry = bytes(range(1, 33)) + struct.pack("<QQQ", 2048, 4095, 0) + "root".encode("utf-16-le")
    protective = magic + _patch(0, 446, _entry(0xEE, 1, count - 1))
    primary = _gpt(1, 1, count - 1, 2, count) + _patch(2, 0, entry)
    last = _FROM_END | 1
    backup = _gpt(last, count - 1, 1, count - 33, count) + _patch(count - 33, 0, entry)
    flagged = b"\1" + size[1:]
    return [
        dos,
        logical,
        flagged + protective + primary + backup,
        flagged + protective + backup,
    ]


TARGET: Final = Target(check, seeds, (b"EFI PART", b"\x55\xaa", b"\xee"))
