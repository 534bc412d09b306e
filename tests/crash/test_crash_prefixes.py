"""A crash after any host write, and after any that the disk was free to reorder (D6).

A workload runs on a recording file.  The file as it was after each change, and as a
power failure could have left it, is opened, checked and compared with what the workload
had been promised by then.
"""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest
import trio

from qedfuse.disk.backing import read_header
from qedfuse.disk.commit import Commit
from tests.support.disks import WRITABLE, build_image, header_of, inspect_image, opened
from tests.support.history import MIXED, History, disk_stamps, order_violations, stamped, stamps
from tests.support.hostfiles import SECTOR, MemoryFile, RecordingFile, Sync

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from trio.testing import MockClock

    from qedfuse.disk.tablecache import WriteBack

CLUSTER: Final = 4096
SPAN: Final = 512 * CLUSTER
OPTIONS: Final = replace(WRITABLE, commit_seconds=1.5, needcheck_seconds=2.0)
BASE_NUMBER: Final = 1 << 32
"""Sector n of a base holds this plus n."""


@dataclass(frozen=True)
class Case:
    """A kind of image and what is done to it."""

    name: str
    size: int = 3 * SPAN
    depth: int = 0
    base_sectors: int = 0
    grows_to: int = 0
    tail: bytes = b""
    writers: int = 3
    writes: int = 16
    options: Any = OPTIONS


CASES: Final = (
    Case("plain"),
    Case("tail", tail=stamped(np.full(5, MIXED >> 1, np.uint64))),
    Case("base", depth=1, base_sectors=4000),
    Case("chain", depth=3, base_sectors=9001),
    Case("grow", size=SPAN // 2 + 512, depth=1, base_sectors=9000, grows_to=2 * SPAN + 1024),
    Case("small cache", depth=1, base_sectors=3000, options=replace(OPTIONS, cache_bytes=0)),
)


def make_bases(case: Case) -> tuple[list[bytearray], NDArray[np.uint64]]:
    """Make the chain below the image, and what its disk holds: some of each layer's own."""
    numbers = np.arange(case.base_sectors, dtype=np.uint64) + np.uint64(BASE_NUMBER)
    if not case.depth:
        return [], np.zeros(0, np.uint64)
    bases = [bytearray(stamped(numbers))]
    for level in range(1, case.depth):
        above = build_image(
            case.base_sectors * SECTOR,
            {
                number: stamped(np.full(8, BASE_NUMBER * (level + 1) + number, np.uint64))
                for number in range(level, 80, 7)
            },
            backing=b"below",
        )
        numbers = disk_stamps(above, numbers)
        bases.insert(0, above)
    return bases, numbers


async def run_workload(case: Case, seed: int) -> History:
    """Write, flush, wait and grow, by several tasks at once, and close."""
    # The order in which trio runs tasks is part of the case.
    trio._core._run._r.seed(seed)
    choice = random.Random(f"{case.name} {seed}")
    bases, below = make_bases(case)
    image = build_image(case.size, backing=b"base" if case.depth else b"") + case.tail
    file = RecordingFile(image)
    # Few places, so that writes meet: in one cluster, across clusters and tables.
    places = [choice.randrange(case.size // SECTOR) for _ in range(6)]
    places += [SPAN // SECTOR - 20, 2 * SPAN // SECTOR - 5, case.size // SECTOR - 30]

    async with opened(file, bases, case.options) as disk:
        history = History(disk, file, below)

        async def writer() -> None:
            for _ in range(case.writes):
                first = max(0, choice.choice(places) + choice.randrange(-16, 16))
                first = min(first, disk.size // SECTOR - 1)
                count = min(choice.choice((1, 3, 8, 24)), disk.size // SECTOR - first)
                await history.write(first, count)
                if choice.random() < 0.25:
                    await history.flush()
                if choice.random() < 0.3:
                    await trio.sleep(choice.choice((0.1, 1.0, 3.0, 5.0)))

        async with trio.open_nursery() as nursery:
            for _ in range(case.writers):
                nursery.start_soon(writer)
            if case.grows_to:
                await trio.sleep(2)
                await history.resize(case.grows_to)
    history.closed()
    return history


async def assert_opens(image: bytes, bases: Sequence[bytearray], below: NDArray[np.uint64]) -> None:
    """Check that our own reader sees in an image what the independent one sees."""
    async with opened(MemoryFile(image, writable=False), bases) as disk:
        got = stamps(bytes(await disk.read(0, disk.size)))
    assert (got == disk_stamps(image, below)).all()


async def assert_usable(
    image: bytes, bases: Sequence[bytearray], below: NDArray[np.uint64]
) -> None:
    """Check that an image can be written to after the crash, without damage to the rest."""
    file = MemoryFile(image)
    before = disk_stamps(image, below)
    leaks = inspect_image(image).leaks
    async with opened(file, bases) as disk:
        for place in (3, len(before) // 2, len(before) - 9):
            await disk.write(place * SECTOR, stamped(np.full(9, 77, np.uint64)))
            before[place : place + 9] = 77
    found = inspect_image(file.content)
    assert found.errors == ()
    assert found.leaks <= leaks
    assert not header_of(file.content).need_check
    assert (disk_stamps(file.content, below) == before).all()


async def assert_checked(image: bytes) -> None:
    """Check that the project's own checker finds nothing worse than leaks."""
    try:
        walk = importlib.import_module("qedfuse.check.walk")
    except ImportError:
        return
    file = MemoryFile(image, writable=False)
    report = await walk.check_image(file, await read_header(file))
    assert not report.errors, report.findings


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_prefix(case: Case, seed: int, autojump_clock: MockClock) -> None:
    """After each change of the file it opens, holds what was flushed, and leaks at worst."""
    history = await run_workload(case, seed)
    bases, below = make_bases(case)
    assert order_violations(history.file) == []
    for count, content in history.file.prefixes():
        assert history.violations(count, content) == [], count
        if count % 17 == 0:
            await assert_opens(bytes(content), bases, below)
            await assert_checked(bytes(content))
        if count % 41 == 0:
            await assert_usable(bytes(content), bases, below)
    assert inspect_image(history.file.content).leaks == 0
    assert not header_of(history.file.content).need_check
    assert autojump_clock.current_time() > 2, "the background tasks took part"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_power_loss(case: Case, seed: int, autojump_clock: MockClock) -> None:
    """The same when the disk was free to choose among the sectors that were not synced."""
    history = await run_workload(case, seed)
    bases, below = make_bases(case)
    choice = random.Random(seed)
    for number, (count, image) in enumerate(power_losses(history.file, choice, 150)):
        assert history.violations(count, image) == [], count
        if number % 17 == 0:
            await assert_opens(bytes(image), bases, below)
            await assert_checked(bytes(image))
        if number % 41 == 0:
            await assert_usable(bytes(image), bases, below)
    assert autojump_clock.current_time() > 2


def power_losses(
    file: RecordingFile, choice: random.Random, most: int
) -> list[tuple[int, bytearray]]:
    """Sample states: the most is at stake right before a sync, so those come first."""
    counts = [n for n, change in enumerate(file.changes) if isinstance(change, Sync)]
    choice.shuffle(counts)
    counts = counts[: most // 2]
    counts += [choice.randrange(len(file.changes)) for _ in range(most - len(counts))]
    keeps = (0.1, 0.5, 0.9)
    return [(count, file.power_loss(count, choice, choice.choice(keeps))) for count in counts]


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_each_barrier_is_needed(
    nth: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """These tests see it if a round leaves out its first, second or third datasync."""
    in_round = Commit._round
    sync = Commit._sync_or_give_back
    count = 0

    async def counted_round(self: Commit) -> None:
        nonlocal count
        count = 0
        await in_round(self)

    async def leaky_sync(self: Commit, writes: Sequence[WriteBack]) -> None:
        nonlocal count
        count += 1
        if count != nth:
            await sync(self, writes)

    monkeypatch.setattr(Commit, "_round", counted_round)
    monkeypatch.setattr(Commit, "_sync_or_give_back", leaky_sync)
    found: list[str] = []
    order: list[str] = []
    for case in CASES[:3]:
        history = await run_workload(case, nth)
        order += order_violations(history.file)
        choice = random.Random(nth)
        for number, image in power_losses(history.file, choice, 150):
            found += history.violations(number, image)
    assert found, "a state that a power failure leaves breaks a promise"
    # Only the order tells of the second one where it comes before an L1 entry: new
    # tables are blank, so that an L1 entry that is too early hides nothing.
    assert any("L1 entries before" in line for line in order) == (nth == 2)
    assert autojump_clock.current_time() > 2
