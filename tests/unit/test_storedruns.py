"""Reads that the extension makes of the files to which the runs of another file refer."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from qedfuse.foreign.runmap import UNKNOWN, ZEROS, RunMap
from qedfuse.hostio.pagesource import PageSource, StoredRuns
from qedfuse.mount.fuse import extraops
from tests.support.fusewire import session_of
from tests.support.readsession import BITS, CLUSTER, CLUSTERS, SLICE_BITS, Session, Tables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

DISK_BYTES = CLUSTERS * CLUSTER


class Stored:
    """A disk below an image without tables: a map of it, and the two files of the map.

    Attributes:
        run_map: The map, which is empty at first.
        contents: The contents of the files.
    """

    def __init__(self, path: Path, session: Session, tables: Tables) -> None:
        """Show the disk to the extension."""
        self.run_map = RunMap(1000)
        self.tables = tables
        self.contents = [random.Random(name).randbytes(DISK_BYTES) for name in "ab"]
        self.files = []
        for name, content in zip("ab", self.contents, strict=True):
            (path / name).write_bytes(content)
            self.files.append((path / name).open("rb"))
        sources = tuple(PageSource(tables.base_policy, file.fileno()) for file in self.files)
        runs = StoredRuns(self.run_map.cells, self.run_map.capacity, sources)
        codes = [cluster * CLUSTER | 3 for cluster in range(CLUSTERS)]
        step = 1 << SLICE_BITS
        for number in range(CLUSTERS // step):
            entries = array("Q", codes[number * step : (number + 1) * step])
            tables.slices["codes", number] = SimpleNamespace(bad=None, entries=entries)
        layer, _keys, *more = tables.arguments()
        no_tables = dict.fromkeys(range(CLUSTERS // step))
        below = PageSource(tables.base_policy, -1, runs=runs)
        session.show(layer, no_tables, *more[:2], (None, below), *more[3:])

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


@pytest.fixture
def session() -> Iterator[Session]:
    """Make a session, and end it."""
    with session_of(Session()) as made:
        yield made


@pytest.fixture
def stored(tmp_path: Path, session: Session) -> Iterator[Stored]:
    """Show a disk with a map."""
    tables = Tables(tmp_path / "file")
    made = Stored(tmp_path, session, tables)
    yield made
    made.close()
    tables.close()


def test_one_run(session: Session, stored: Stored) -> None:
    """A read within a run gets the bytes of its file, from the moment when the map has the run."""
    assert session.read(0, 8) is None
    stored.run_map.add(1000, 1, 700)
    assert session.read(0, 1001) is None
    assert session.read(0, 1000) == stored.contents[1][700:1700]
    stored.run_map.add(500, 1, 1700)
    assert session.read(999, 2) == stored.contents[1][1699:1701]
    assert session.read(1499, 1) == stored.contents[1][2199:2200]
    assert stored.tables.file_reads.tolist() == [0, 0, 3, 1003], "the disk, not its files"


def test_no_file(session: Session, stored: Stored) -> None:
    """Zeros, what only QEMU can read, and ranges of several runs go to the function."""
    for file, offset in ((0, 0), (ZEROS, 0), (UNKNOWN, 0), (1, 0), (0, 1000), (0, 50)):
        assert stored.run_map.add(100, file, offset)
    expected = [True, False, False, True, True, True]
    assert [session.read(at * 100, 100) is not None for at in range(6)] == expected
    for start in (50, 150, 250, 350, 450, 550):
        assert session.read(start, 100) is None


def test_file_that_is_not_there(session: Session, stored: Stored) -> None:
    """A number of a file that is too large is not used."""
    assert stored.run_map.add(100, 2, 0)
    assert session.read(0, 100) is None


def test_full_map(session: Session, stored: Stored) -> None:
    """All runs of a map of maximum size are found."""
    for at in range(1000):
        assert stored.run_map.add(8, at % 2, at * 8)
    assert not stored.run_map.add(8, 0, 0)
    for at in range(1000):
        content = stored.contents[at % 2][at * 8 :]
        assert session.read(at * 8, 8) == content[:8]
    assert session.read(8000, 1) is None


def test_random_runs(session: Session, stored: Stored) -> None:
    """The extension and `RunMap.parts` agree about every read."""
    chance = random.Random(2)
    while stored.run_map.end < DISK_BYTES:
        length = min(chance.choice((512, 1024, 8192)), DISK_BYTES - stored.run_map.end)
        file = chance.choice((ZEROS, UNKNOWN, 0, 0, 1, 1))
        offset = chance.randrange(DISK_BYTES - length) if file >= 0 else 0
        assert stored.run_map.add(length, file, offset)
    answered = 0
    for _ in range(500):
        length = chance.choice((1, 512, 600, 5000))
        start = chance.randrange(DISK_BYTES - length)
        parts = list(stored.run_map.parts(start, length))
        expected = None
        crosses_slices = start >> BITS >> SLICE_BITS != (start + length - 1) >> BITS >> SLICE_BITS
        if len(parts) == 1 and parts[0].file >= 0 and not crosses_slices:
            content = stored.contents[parts[0].file]
            expected = content[parts[0].offset :][:length]
            answered += 1
        assert session.read(start, length) == expected
    assert 100 < answered < 400


def test_wrong_runs(tmp_path: Path, session: Session) -> None:
    """Cells that are fewer than the runs need are refused."""
    tables = Tables(tmp_path / "file")
    arguments = tables.arguments()
    source = PageSource(tables.policy, -1, runs=StoredRuns(RunMap(10).cells, 11, ()))
    with pytest.raises(ValueError, match="fewer cells"):
        session.show(*arguments[:4], (source,), *arguments[5:])
    tables.close()
