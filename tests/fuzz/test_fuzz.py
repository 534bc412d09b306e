"""Fixed cases of the fuzzer, and its model alone."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from typing import Final

import pytest

from tests.fuzz.model import SECTOR, Model
from tests.fuzz.plan import CLUSTER_BYTES, DISK_BYTES, OPTIONS, draw_plan
from tests.support.extensions import NATIVE_THREADS
from tests.support.programs import TREE, environment
from tests.support.share import share

_SEEDS: Final = (10, 11, 12, 13, 31, 45, 55, 78)
"""Cases that together draw every parameter; longer runs are made on demand.

The case with the seed 10 grows the disk by data that only the kernel's cache has.
"""
_HANG_SECONDS: Final = 400


@pytest.mark.timeout(_HANG_SECONDS)
def test_fixed_cases_find_nothing() -> None:
    """Fixed cases, some of which kill the server, find nothing.

    Without native threads, or without extensions, the first three suffice.
    """
    seeds = _SEEDS if NATIVE_THREADS else _SEEDS[: share(3, of=len(_SEEDS))]
    cases = [f"--case={seed}" for seed in seeds]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *cases],
        cwd=TREE,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=_HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"(\d+) cases, (\d+) kills: nothing found\n", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) == len(seeds)
    assert int(found[2]) > 0, "no case killed the server"


def test_fixed_cases_draw_each_parameter() -> None:
    """The fixed cases together draw each size, geometry, option and number of threads."""
    plans = [draw_plan(random.Random(seed)) for seed in _SEEDS]
    assert {plan.size for plan in plans} == set(DISK_BYTES)
    assert {plan.cluster_size for plan in plans} == set(CLUSTER_BYTES)
    assert {word for plan in plans for word in plan.words} >= set(OPTIONS)
    assert {plan.threads for plan in plans} == {1, 2, 4}
    assert {plan.base for plan in plans} == {plan.on_file for plan in plans} == {False, True}


def sector(byte: bytes) -> bytes:
    """Return a sector filled with a byte."""
    return byte * SECTOR


def write(model: Model, start: int, data: bytes) -> None:
    """Write successfully."""
    model.end(model.begin(start, data))


def test_what_was_synced_must_survive() -> None:
    """The old content of a sector is accepted until a sync that began after the write has ended."""
    model = Model(bytes(4 * SECTOR))
    write(model, 10, b"a")
    mark = model.begin_sync()
    write(model, SECTOR, sector(b"b"))
    model.end_sync(mark)
    synced = bytes(10) + b"a" + bytes(SECTOR - 11)
    assert model.read(0, 2 * SECTOR) == synced + sector(b"b")
    wrong = model.adopt(bytes(4 * SECTOR))
    assert wrong is not None
    assert "sector 0" in wrong
    assert model.adopt(synced + bytes(3 * SECTOR)) is None
    assert model.read(SECTOR, SECTOR) == sector(b"\0")


def test_a_sector_is_old_or_new() -> None:
    """Neither a third content nor half of a sector is accepted."""
    for third in (sector(b"c"), sector(b"b")[:100] + bytes(SECTOR - 100)):
        model = Model(bytes(SECTOR))
        write(model, 0, sector(b"b"))
        assert model.adopt(third) is not None
    model = Model(bytes(SECTOR))
    model.begin(0, sector(b"b"))
    assert model.adopt(sector(b"b")) is None, "a write that has not returned"


def test_growth_survives_with_a_sync() -> None:
    """The size after a kill is accepted if it is between the synced and the present size."""
    model = Model(bytes(SECTOR))
    model.grow(3 * SECTOR)
    mark = model.begin_sync()
    model.grow(4 * SECTOR)
    model.end_sync(mark)
    assert model.adopt(bytes(2 * SECTOR)) is not None
    assert model.adopt(bytes(5 * SECTOR)) is not None
    assert model.adopt(bytes(3 * SECTOR)) is None
