"""Make a disk as a power cut could have left it, from the log of the drive's requests.

The log is one of QEMU's driver ``blklogwrites``, in the format of Linux's dm-log-writes.
A flush makes durable all requests that were complete when it came.  After the last flush
before the cut each 512-byte sector independently has its new content or not, as when a drive
loses its cache.

Needs only Python; runs on the host of the virtual machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR: Final = 512
MARK: Final = struct.Struct("<8sQQ")
"""A mark in the log: `MARK_MAGIC`, its kind, its number."""
MARK_MAGIC: Final = b"QEDMARK1"
MARK_AREA_BYTES: Final = 1 << 20
"""Marks are written to the end of the disk, past its file system."""
READY: Final = 0
"""The kind of the mark after which a cut is allowed."""

_MAGIC: Final = 0x6A736677736872
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4
_MAX_SECTORS: Final = 1 << 20


class Entry(NamedTuple):
    """One request: its flags, first sector, number of sectors, and its data's offset in the log."""

    flags: int
    sector: int
    length: int
    offset: int


def entries(log: BinaryIO) -> Iterator[Entry]:
    """List the entries of a log, up to the first one that is incomplete.

    Raises:
        ValueError: The file is not such a log.
    """
    magic, version, _count, size = _SUPER.unpack(log.read(_SUPER.size))
    if (magic, version) != (_MAGIC, 1):
        msg = f"no log of writes: found {magic:#x}, version {version}"
        raise ValueError(msg)
    end = os.fstat(log.fileno()).st_size
    position = size
    while position + size <= end:
        log.seek(position)
        sector, count, flags, _length = _ENTRY.unpack(log.read(_ENTRY.size))
        position += size
        data = 0 if flags & _DISCARD else count * SECTOR
        # The superblock's count may be old, so the first entry of zeros is the end.
        if not (count or flags) or count > _MAX_SECTORS or position + data > end:
            return
        yield Entry(flags, sector, count, position)
        position += -(-data // size) * size


def read(log: BinaryIO, entry: Entry) -> bytes:
    """Return the bytes that an entry writes."""
    if entry.flags & _DISCARD:
        return bytes(entry.length * SECTOR)
    log.seek(entry.offset)
    return log.read(entry.length * SECTOR)


def find_marks(log: BinaryIO, found: list[Entry], first_sector: int) -> dict[int, tuple[int, int]]:
    """Return kind and number of each mark, by its index in the log."""
    marks = {}
    for index, entry in enumerate(found):
        if entry.sector >= first_sector and entry.length and not entry.flags & _DISCARD:
            magic, kind, number = MARK.unpack(read(log, entry)[: MARK.size])
            if magic == MARK_MAGIC:
                marks[index] = (kind, number)
    return marks


def replay(log: BinaryIO, size: int, target: BinaryIO, chance: random.Random) -> dict[str, object]:
    """Make a disk of ``size`` bytes as a power cut at a random moment may leave it.

    Returns:
        The facts of the cut: the length of the log and the cut's index, whether the cut is
        the end of the log with nothing lost, and the last number of each kind of mark.
    """
    found = list(entries(log))
    marks = find_marks(log, found, (size - MARK_AREA_BYTES) // SECTOR)
    ready = next((index for index, (kind, _) in marks.items() if kind == READY), None)
    if ready is None:
        msg = "the cut came before the workload began"
        raise ValueError(msg)
    # In one of five cuts only the memory is lost, and the drive keeps all requests.
    is_whole = chance.random() < 0.2
    cut = len(found) if is_whole else chance.randrange(ready + 1, len(found) + 1)
    flushed = max((i for i in range(cut) if found[i].flags & _FLUSH), default=0)
    keep = chance.choice((0.0, 0.1, 0.5, 0.9))
    target.truncate(size)
    for index, entry in enumerate(found[:cut]):
        data = read(log, entry)
        is_durable = index < flushed or is_whole or bool(entry.flags & _FUA)
        if is_durable:
            target.seek(entry.sector * SECTOR)
            target.write(data)
            continue
        for number in range(entry.length):
            if chance.random() < keep:
                target.seek((entry.sector + number) * SECTOR)
                target.write(data[number * SECTOR : (number + 1) * SECTOR])
    synced = {kind: number for index, (kind, number) in marks.items() if index < cut}
    facts = {"entries": len(found), "cut": cut, "whole": is_whole, "keep": keep}
    lost = sum(found[i].length for i in range(flushed, cut)) if not is_whole else 0
    return {**facts, "unflushed": lost * SECTOR, "synced": synced}


def main() -> None:
    """Parse the command line; write the disk, with the facts of the cut at its end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the disk")
    parser.add_argument("log", type=Path)
    parser.add_argument("disk", type=Path)
    given = parser.parse_args()
    with given.log.open("rb") as log, given.disk.open("wb") as target:
        facts = replay(log, given.size, target, random.Random(f"cut {given.seed}"))
        target.seek(given.size - MARK_AREA_BYTES)
        target.write(json.dumps(facts).encode().ljust(MARK_AREA_BYTES, b"\0"))


if __name__ == "__main__":
    main()
