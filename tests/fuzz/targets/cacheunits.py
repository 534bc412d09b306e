"""The units of an entry of the cache: a load returns bytes with the right checksum, or nothing.

An input is the size of the object (three bytes), flags, and patches of the two files: which file
(one byte), an offset (three bytes), a length (one byte), the bytes.
"""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress
from typing import Final

from qedfuse.remote.unitfile import DATA_NAME, MAP_NAME, UNIT_BYTES, UnitFile, make_files, units_of
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.scratch import scratch
from tests.fuzz.targets.target import Target

_MAX_OBJECT_BYTES: Final = 3 * UNIT_BYTES
_PRESENT: Final = 0x51454455


def check(data: bytes) -> None:
    """Change the files of an entry while it is open, and load all units."""
    drawn = Drawn(data)
    size, flags = drawn.number(3) % _MAX_OBJECT_BYTES, drawn.number()
    directory = scratch("cacheunits")
    for name in (DATA_NAME, MAP_NAME):
        with suppress(FileNotFoundError):
            (directory / name).unlink()
    make_files(str(directory), size)
    if flags & 1:
        with UnitFile.open(str(directory), size) as entry:
            for unit in range(units_of(size)):
                entry.store(unit, bytes((unit + 1,)) * entry.length(unit))
    while drawn:
        name, offset = drawn.choice((DATA_NAME, MAP_NAME)), drawn.number(3) % _MAX_OBJECT_BYTES
        with open(directory / name, "r+b", buffering=0) as file:  # noqa: PTH123  unbuffered
            if flags & 2:
                file.truncate(offset)
            file.seek(offset)
            file.write(drawn.string())
    with suppress(OSError):
        _load_all(str(directory), size)


def _load_all(directory: str, size: int) -> None:
    """Load all units, and compare each that is returned with the files.

    Raises:
        OSError: The entry is refused.
    """
    with UnitFile.open(directory, size) as entry:
        present = bytearray()
        for unit in range(entry.units):
            length = entry.length(unit)
            raw = _bytes_at(f"{directory}/{MAP_NAME}", unit * 8, 8)
            checksum, mark = struct.unpack("<II", raw)
            present.append(mark == _PRESENT)
            content = entry.load(unit)
            stored = _bytes_at(f"{directory}/{DATA_NAME}", unit * UNIT_BYTES, length)
            is_right = mark == _PRESENT and zlib.crc32(stored, unit) == checksum
            is_right &= len(stored) == length
            assert content == (stored if is_right else None), f"unit {unit}"
        assert entry.has_units(bytes(present))
        assert entry.has_units() == (0 not in present)
        assert entry.removed_usage() is None


def _bytes_at(path: str, offset: int, length: int) -> bytes:
    """Return a range of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def seeds() -> list[bytes]:
    """Return entries with all units, with a damaged unit, and with a damaged map."""
    size = (UNIT_BYTES + 5).to_bytes(3, "little")
    return [
        size + b"\1",
        size + b"\1" + b"\0\0\0\0\4abcd",
        size + b"\1" + b"\1\0\0\0\4abcd",
        size
        + b"\0"
        + b"\1\0\0\0\x08"
        + struct.pack("<II", zlib.crc32(bytes(UNIT_BYTES)), _PRESENT),
        b"\0\0\0\1",
        size + b"\3" + b"\0\1\0\0\4abcd",
    ]


TARGET: Final = Target(check, seeds, (_PRESENT.to_bytes(4, "little"),), max_bytes=200)
