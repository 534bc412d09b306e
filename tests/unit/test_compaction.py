"""Compaction makes the file as short as possible, and loses nothing at any step."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.disk.maintenance.compaction import Limits
from qedfuse.disk.maintenance.mover import Mover
from qedfuse.disk.maintenance.tablecompaction import TableCompaction
from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ZERO
from qedfuse.tools.editing.compact import CompactResult, compact
from tests.support import qemu
from tests.support.compactible import CLUSTER, LongestFile, UsedImage, assert_minimal
from tests.support.disks import (
    UNCOMPACTED,
    WRITABLE,
    build_image,
    difference,
    get_entry,
    guest_bytes,
    header_of,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Sync
from tests.support.share import share

if TYPE_CHECKING:
    from qedfuse.disk.maintenance.datacompaction import MoveCounter
    from tests.support.hostfiles import Action


@pytest.mark.parametrize("seed", range(share(20, of=60)))
async def test_the_file_becomes_as_short_as_it_can_be(seed: int) -> None:
    """Compaction of an image of any shape leaves no free cluster, and keeps its content."""
    used = await UsedImage.make(random.Random(seed))
    header = header_of(used.content)
    bound = header.geometry.bound(header.header_end, header.image_size)
    file = RecordingFile(used.content)
    steps: list[tuple[int, int]] = []
    async with opened(file, options=UNCOMPACTED) as disk:
        moved = await disk.compact(lambda done, total: steps.append((done, total)))
        for number in used.pool:
            got = await disk.read(number * CLUSTER, CLUSTER)
            assert got == used.data.get(number, bytes(CLUSTER))
        await disk.write(used.pool[0] * CLUSTER, b"y" * CLUSTER)
    used.data[used.pool[0]] = b"y" * CLUSTER
    used.assert_holds(file.content)
    await assert_minimal(file.content)
    assert not header_of(file.content).need_check
    assert len(file.content) <= max(len(used.content), bound)
    if moved:
        assert steps[-1][0] == steps[-1][1] == moved * CLUSTER
        assert steps == sorted(steps)


def record_packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of moved clusters of each packing from now on."""
    packs: list[int] = []
    pack = TableCompaction._pack

    async def recorded(
        self: TableCompaction, most: int | None, counter: MoveCounter, *, within_bound: bool
    ) -> None:
        before = counter.moved_clusters
        await pack(self, most, counter, within_bound=within_bound)
        packs.append(counter.moved_clusters - before)

    monkeypatch.setattr(TableCompaction, "_pack", recorded)
    return packs


async def test_tables_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that fit into no gap are packed side by side."""
    packs = record_packs(monkeypatch)
    span = 4 * 512
    clusters: dict[int, bytes | int] = {}
    for table in range(4):
        for number in range(7):
            clusters[table * span + number] = pattern(CLUSTER, table * 10 + number)
    image = build_image(5 * span * CLUSTER, clusters, table_size=4)
    for table in range(4):
        for number in (0, 2, 4, 6):
            put_entry(image, l2_entry_offset(image, table * span + number), 0)
    expected = guest_bytes(image)
    file = MemoryFile(image)
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.compact()
    assert len(packs) == 1
    await assert_minimal(file.content)
    assert difference(guest_bytes(file.content), expected) is None


def fragmented_image(choice: random.Random) -> bytearray:
    """Return an image of a few tables, whose file has many short runs of free clusters."""
    table_size, tables, used = choice.choice((2, 4, 8, 16)), choice.randrange(2, 6), 60
    span = table_size * 512
    numbers = [table * span + number for table in range(tables) for number in range(used)]
    clusters: dict[int, bytes | int] = {number: pattern(CLUSTER, number) for number in numbers}
    image = build_image((tables + 1) * span * CLUSTER, clusters, table_size=table_size)
    for number in numbers:
        if choice.random() < 0.4:
            put_entry(image, l2_entry_offset(image, number), 0)
    return image


async def test_packing_tables_moves_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction moves as many clusters as its limit allows at most, also if it packs tables."""
    packs = record_packs(monkeypatch)
    for seed in range(12):
        image = fragmented_image(random.Random(seed))
        for most in (48, 64, 80, 96):
            file = MemoryFile(image)
            async with opened(file, options=UNCOMPACTED) as disk:
                await disk.ensure_scanned()
                limits = Limits(most * CLUSTER, math.inf)
                moved = await disk._components.compaction.run(within_bound=False, limits=limits)
            assert moved <= most, (seed, most)
            assert inspect_image(file.content).errors == ()
    assert sum(moved > 0 for moved in packs) > 5


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("table_size", [2, 4, 16])
async def test_packing_tables_exceeds_the_bound_by_the_tables_at_most(
    table_size: int, *, allowed: bool
) -> None:
    """A close does not exceed the bound; a tool exceeds it by all tables and one more at most."""
    span, tables = table_size * 512, 3
    clusters: dict[int, bytes | int] = {n: b"%d" % n for n in range(tables * span)}
    image = build_image(tables * span * CLUSTER, clusters, table_size=table_size)
    # The last table comes to the end of the file, where it has to leave.
    l1_entry = header_of(image).l1_table_offset + 8 * (tables - 1)
    table, length = get_entry(image, l1_entry), table_size * CLUSTER
    for number in range((tables - 1) * span, tables * span):
        entry = l2_entry_offset(image, number)
        put_entry(image, entry, get_entry(image, entry) - length)
    put_entry(image, l1_entry, len(image) - length)
    image[table:] = image[table + length :] + image[table : table + length]
    # A full disk, but for some clusters one by one where all tables are going to lie.
    for number in range(0, 2 * table_size, 2):
        put_entry(image, l2_entry_offset(image, number), 0)
    header = header_of(image)
    bound = header.geometry.bound(header.header_end, header.image_size)
    assert len(image) == bound
    file = LongestFile(image)
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.compact(within_bound=not allowed)
    if allowed:
        assert bound < file.longest <= bound + (tables + 1) * length
        await assert_minimal(file.content)
        assert len(file.content) == bound - length
    else:
        assert file.longest <= bound


async def test_zero_clusters_and_a_second_compaction() -> None:
    """Zero entries and entries of the base stay, and a second compaction moves nothing."""
    clusters: dict[int, bytes | int] = {at: pattern(CLUSTER, at) for at in range(12)}
    clusters |= {20: ZERO, 21: ZERO}
    image = build_image(40 * CLUSTER, clusters, backing=b"base")
    for at in (1, 2, 5):
        put_entry(image, l2_entry_offset(image, at), 0)
    base = pattern(40 * CLUSTER, 99)
    expected = guest_bytes(image, base)
    file = RecordingFile(image)
    async with opened(file, [base], UNCOMPACTED) as disk:
        assert await disk.compact() == 3
        before = len(file.changes)
        assert await disk.compact() == 0
        assert all(isinstance(change, Sync) for change in file.changes[before:])
    assert difference(guest_bytes(file.content, base), expected) is None
    await assert_minimal(file.content)


async def test_compacting_when_the_disk_is_closed() -> None:
    """With compact=full the close compacts the image."""
    image = build_image(40 * CLUSTER, {at: pattern(CLUSTER, at) for at in range(12)})
    put_entry(image, l2_entry_offset(image, 1), 0)
    file = MemoryFile(image)
    async with opened(file, options=replace(WRITABLE, compact="full")) as disk:
        await disk.discard(4 * CLUSTER, 3 * CLUSTER)
    await assert_minimal(file.content)
    assert len(file.content) == len(image) - 4 * CLUSTER


@pytest.mark.parametrize(("action", "calls"), [("read", 7), ("write", 3), ("reserve", 1)])
async def test_compaction_after_a_failed_one_completes(action: Action, calls: int) -> None:
    """A compaction that fails at any host call loses nothing, and the next one completes."""
    used = await UsedImage.make(random.Random(11))
    for nth in itertools.count(1):
        inner = MemoryFile(used.content)
        file = FailingFile(inner)
        async with opened(file, options=UNCOMPACTED) as disk:
            await disk.ensure_scanned()
            file.fail(action, nth, may_miss=True)
            try:
                await disk.compact()
            except HostError:
                await disk.compact()
            file.heal()
        used.assert_holds(inner.content)
        await assert_minimal(inner.content)
        if not file.struck[action]:
            break
    assert nth == calls + 1, "each of the calls failed once"


@pytest.mark.expect_log("(while compacting)")
async def test_a_failed_compaction_does_not_fail_the_close() -> None:
    """A close whose compaction fails leaves a clean image, with free clusters in its file."""
    image = build_image(40 * CLUSTER, {at: pattern(CLUSTER, at) for at in range(12)})
    put_entry(image, l2_entry_offset(image, 1), 0)
    inner = MemoryFile(image)
    file = FailingFile(inner)
    async with opened(file, options=replace(WRITABLE, compact="full")) as disk:
        await disk.ensure_scanned()
        await disk.read(0, 1)
        file.fail("read", 1)
    assert not header_of(inner.content).need_check
    assert inspect_image(inner.content).errors == ()


@pytest.mark.parametrize("can_punch", [True, False])
async def test_a_file_that_another_program_cuts_is_not_compacted(
    monkeypatch: pytest.MonkeyPatch, *, can_punch: bool
) -> None:
    """A cluster that another program has cut off moves nowhere, and the compaction ends."""
    image = build_image(40 * CLUSTER, {at: pattern(CLUSTER, at) for at in range(12)})
    put_entry(image, l2_entry_offset(image, 1), 0)
    file = MemoryFile(image)
    file.can_punch = can_punch
    copy, cut_at = Mover._copy, 0

    async def cut_before_copy(self: Mover, source: int, target: int, length: int) -> None:
        nonlocal cut_at
        cut_at = source + 100
        del file.content[cut_at:]
        with trio.fail_after(60):
            await copy(self, source, target, length)

    monkeypatch.setattr(Mover, "_copy", cut_before_copy)
    async with opened(file, options=UNCOMPACTED) as disk:
        with pytest.raises(HostError, match="found the file cut to"):
            await disk.compact()
    last = l2_entry_offset(image, 11)
    assert get_entry(file.content, last) == get_entry(image, last) == cut_at - 100


@pytest.mark.expect_log("not compacted: the free clusters are not known")
@pytest.mark.expect_log("found invalid table entries")
async def test_a_damaged_image_is_left_alone() -> None:
    """An image with a bad entry is not compacted."""
    image = build_image(40 * CLUSTER, {at: pattern(CLUSTER, at) for at in range(12)})
    put_entry(image, l2_entry_offset(image, 1), 0)
    put_entry(image, l2_entry_offset(image, 3), len(image) + CLUSTER)
    file = MemoryFile(image)
    async with opened(file, options=UNCOMPACTED) as disk:
        assert await disk.compact() == 0
    assert get_entry(file.content, l2_entry_offset(file.content, 11)) == get_entry(
        image, l2_entry_offset(image, 11)
    )


@pytest.mark.parametrize("seed", range(6))
async def test_interrupted_after_any_write(seed: int) -> None:
    """Every prefix of the writes of a compaction is a sound image with the whole content."""
    used = await UsedImage.make(random.Random(seed))
    file = RecordingFile(used.content)
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.compact()
    for count, content in file.prefixes():
        found = inspect_image(content)
        assert found.errors == (), count
        used.assert_holds(content)


async def test_what_qemu_leaked(tmp_path: object) -> None:
    """Compaction removes what QEMU has leaked, and QEMU finds the image clean and unchanged."""
    path = str(tmp_path) + "/vm.qed"
    qemu.create(path, 64 << 20)
    qemu.io(path, *(f"write -P {at + 1} {at * 3}M 1M" for at in range(12)))
    with open(path, "r+b") as file:  # noqa: ASYNC230, PTH123  nothing runs beside it
        image = bytearray(file.read())
        for number in (0, 16 * 3, 16 * 3 + 1, 16 * 9 + 5):
            put_entry(image, l2_entry_offset(image, number), 0)
        file.seek(0)
        file.write(image + bytes(65536 * 3))
    before = qemu.content(path)
    assert qemu.check(path).code == 3
    steps: list[tuple[int, int]] = []
    result = await compact(path, progress=lambda done, total: steps.append((done, total)))
    assert result == CompactResult(len(image) + 3 * 65536, len(image) - 4 * 65536, 4)
    assert steps[-1] == (4 * 65536, 4 * 65536)
    assert qemu.check(path).code == 0
    assert qemu.content(path) == before
