"""What a power cut leaves of a disk, rebuilt from the log of its drive (`tests.vm.replay`)."""

from __future__ import annotations

import io
import random
import struct
from typing import TYPE_CHECKING, Final

import pytest

from tests.vm.replay import MARK, MARK_AREA_BYTES, MARK_MAGIC, READY, SECTOR, replay

if TYPE_CHECKING:
    from pathlib import Path

SIZE: Final = 4 << 20
FLUSH, FUA, DISCARD = 1, 2, 4
SYNC: Final = 7


class Log:
    """Writes a log as QEMU does, with a superblock that lags behind."""

    def __init__(self) -> None:
        """Begin with nothing but the mark from which on a cut is allowed."""
        self.content = bytearray(struct.pack("<QQQI", 0x6A736677736872, 1, 0, SECTOR))
        self.content += bytes(SECTOR - len(self.content))
        self.mark(READY, 1)

    def write(self, sector: int, data: bytes, flags: int = 0) -> None:
        """Write whole sectors."""
        head = struct.pack("<QQQQ", sector, len(data) // SECTOR, flags, 0)
        self.content += head + bytes(SECTOR - len(head))
        self.content += b"" if flags & DISCARD else data

    def mark(self, kind: int, number: int) -> None:
        """Leave a mark."""
        mark = MARK.pack(MARK_MAGIC, kind, number).ljust(SECTOR, b"\0")
        self.write((SIZE - MARK_AREA_BYTES) // SECTOR + kind, mark)

    def cut(self, path: Path, seed: int) -> tuple[dict[str, object], bytes]:
        """Return the facts of a cut, and the disk that it leaves."""
        path.write_bytes(self.content + bytes(1 << 16))
        with path.open("rb") as log:
            target = io.BytesIO(bytes(SIZE))
            facts = replay(log, SIZE, target, random.Random(seed))
        return facts, target.getvalue()


def test_what_was_flushed_is_there_and_the_rest_is_there_or_not(tmp_path: Path) -> None:
    """A cut keeps all flushed sectors, and any subset of those written since."""
    log = Log()
    log.write(8, b"a" * 2 * SECTOR)
    log.write(0, b"", FLUSH)
    log.mark(SYNC, 3)
    log.write(8, b"b" * 2 * SECTOR)
    log.write(20, b"f" * SECTOR, FUA)
    log.write(30, b"c" * SECTOR)
    log.write(30, bytes(SECTOR), DISCARD)
    seen = set()
    for seed in range(300):
        facts, disk = log.cut(tmp_path / "log", seed)
        assert facts["entries"] == 8
        first, second, forced, last = (disk[n * SECTOR] for n in (8, 9, 20, 30))
        synced = facts["synced"]
        assert isinstance(synced, dict)
        assert isinstance(facts["cut"], int)
        if facts["cut"] > 2:
            assert {first, second} <= set(b"ab")
        assert (SYNC in synced) == (facts["cut"] > 3)
        assert (forced == ord("f")) == (facts["cut"] > 5)
        if facts["whole"]:
            assert (facts["cut"], facts["unflushed"], first, last) == (8, 0, ord("b"), 0)
        seen.add((first, second, last))
    assert (*b"ab", 0) in seen, "a request is torn"
    assert (*b"ba", 0) in seen
    assert {last for *_, last in seen} == {0, ord("c")}


def test_a_log_that_ends_in_the_midst_of_an_entry_ends_before_it(tmp_path: Path) -> None:
    """A log that ends within an entry is read up to that entry."""
    log = Log()
    log.write(8, b"a" * SECTOR)
    log.content += struct.pack("<QQQQ", 8, 1 << 30, 0, 0)
    facts, _disk = log.cut(tmp_path / "log", 1)
    assert facts["entries"] == 2


def test_a_cut_before_the_workload_is_refused(tmp_path: Path) -> None:
    """A cut before the workload, and a file that is not a log, are refused."""
    log = Log()
    del log.content[SECTOR:]
    with pytest.raises(ValueError, match="before the workload"):
        log.cut(tmp_path / "log", 1)
    log.content[0] = 0
    with pytest.raises(ValueError, match="no log of writes"):
        log.cut(tmp_path / "log", 1)
