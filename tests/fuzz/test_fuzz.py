"""A fixed share of the fuzzer in each test run, and its model alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

from tests.fuzz.model import SECTOR, Model
from tests.support.mounted import TREE, environment

_SECONDS: Final = 40
_FIRST: Final = 10
"""The seed with which it begins: this case finds growth that lseek(2) does not know of."""
_HANG_SECONDS: Final = 400


def test_a_share_of_the_fuzzer() -> None:
    """From a fixed seed on, less than a minute: nothing is found."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", f"--seconds={_SECONDS}", f"--seed={_FIRST}"],
        cwd=TREE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=_HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 0
    assert done.stdout.endswith(f"cases from seed {_FIRST}: nothing found\n")


def sector(byte: bytes) -> bytes:
    """Fill a sector."""
    return byte * SECTOR


def write(model: Model, start: int, data: bytes) -> None:
    """Write, with success."""
    model.end(model.begin(start, data))


def test_what_was_synced_must_survive() -> None:
    """The old content is accepted until a sync that began after the write has ended."""
    model = Model(bytes(4 * SECTOR))
    write(model, 10, b"a")
    mark = model.begin_sync()
    write(model, SECTOR, sector(b"b"))
    model.end_sync(mark)
    synced = bytes(10) + b"a" + bytes(SECTOR - 11)
    assert model.read(0, 2 * SECTOR) == synced + sector(b"b")
    wrong = model.settle(bytes(4 * SECTOR))
    assert wrong is not None
    assert "sector 0" in wrong
    assert model.settle(synced + bytes(3 * SECTOR)) is None
    assert model.read(SECTOR, SECTOR) == sector(b"\0")


def test_a_sector_is_old_or_new() -> None:
    """A third content is refused, and so is half of a sector."""
    for third in (sector(b"c"), sector(b"b")[:100] + bytes(SECTOR - 100)):
        model = Model(bytes(SECTOR))
        write(model, 0, sector(b"b"))
        assert model.settle(third) is not None
    model = Model(bytes(SECTOR))
    model.begin(0, sector(b"b"))
    assert model.settle(sector(b"b")) is None, "a write that has not returned"


def test_growth_survives_with_a_sync() -> None:
    """The size as well is old or new."""
    model = Model(bytes(SECTOR))
    model.grow(3 * SECTOR)
    mark = model.begin_sync()
    model.grow(4 * SECTOR)
    model.end_sync(mark)
    assert model.settle(bytes(2 * SECTOR)) is not None
    assert model.settle(bytes(5 * SECTOR)) is not None
    assert model.settle(bytes(3 * SECTOR)) is None
