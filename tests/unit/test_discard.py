"""Discards and writes of zeros: which clusters they free, and what the disk reads as afterwards."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.disk.space import quarantine
from qedfuse.errors import CorruptImageError, HostError, NoSpaceError, ReadOnlyError
from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from qedfuse.ondisk.geometry import Geometry
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
from tests.support.hostfiles import FailingFile, MemoryFile, Punch, RecordingFile, Sync, Write

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.disk.disk import Disk

CLUSTER: Final = 4096
SIZE: Final = 64 * CLUSTER
BASE: Final = pattern(40 * CLUSTER + 700, 7)


def full(count: int = 10, **more: bytes) -> bytearray:
    """Return an image whose first clusters hold data."""
    return build_image(SIZE, {at: pattern(CLUSTER, at) for at in range(count)}, **more)  # type: ignore[arg-type]


async def freed(disk: Disk) -> int:
    """Flush, and return how many clusters are free."""
    await disk.ensure_scanned()
    await disk.flush()
    statistics = disk.statistics()
    assert statistics.quarantined_clusters == 0
    assert statistics.free_clusters is not None
    return statistics.free_clusters


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0, 3 * CLUSTER),
        (2 * CLUSTER, CLUSTER),
        (100, 50),
        (CLUSTER - 1, 2),
        (CLUSTER - 1, CLUSTER + 2),
        (3 * CLUSTER + 5, 40 * CLUSTER),
        (30 * CLUSTER, 20 * CLUSTER),
        (39 * CLUSTER + 1, CLUSTER + 900),
        (0, SIZE),
        (SIZE - 10, 1 << 62),
    ],
)
async def test_a_discarded_range_reads_as_zeros(start: int, length: int, *, based: bool) -> None:
    """A discarded range reads as zeros, and the rest of the disk is unchanged."""
    file = MemoryFile(full(backing=b"base") if based else full())
    bases = [BASE] if based else []
    expected = bytearray(guest_bytes(file.content, BASE if based else b""))
    expected[start : min(start + length, SIZE)] = bytes(min(length, SIZE - start))
    async with opened(file, bases) as disk:
        await disk.discard(start, length)
        assert difference(await disk.read(0, SIZE), expected) is None
        await disk.flush()
        assert difference(guest_bytes(file.content, *bases), expected) is None
    assert difference(guest_bytes(file.content, *bases), expected) is None
    assert inspect_image(file.content).errors == ()
    assert not header_of(file.content).need_check


async def test_what_a_discarded_cluster_becomes() -> None:
    """A discarded cluster becomes unallocated, or a zero cluster where the base has data."""
    file = MemoryFile(full(50, backing=b"base"))
    async with opened(file, [BASE]) as disk:
        await disk.discard(39 * CLUSTER, 4 * CLUSTER)
    entries = [get_entry(file.content, l2_entry_offset(file.content, at)) for at in range(39, 43)]
    assert entries == [ZERO, ZERO, UNALLOCATED, UNALLOCATED], "the base ends within cluster 40"


async def test_discarding_nothing_changes_nothing() -> None:
    """Discarding unallocated clusters writes nothing: no table, no NEED_CHECK."""
    sparse = build_image(SIZE, {3: pattern(CLUSTER, 3)}, backing=b"below")
    for image, bases in ((build_image(SIZE), []), (build_image(SIZE, backing=b"base"), [sparse])):
        file = RecordingFile(image)
        async with opened(file, bases) as disk:
            await disk.discard(4 * CLUSTER, SIZE)
            await disk.discard(5 * CLUSTER + 17, 100)
            await disk.discard(SIZE, CLUSTER)
        assert file.changes == []


async def test_the_last_cluster_of_an_odd_disk_is_freed() -> None:
    """A discard up to the end of the disk frees the last cluster, which is partly past it."""
    size = 3 * CLUSTER + 512
    file = MemoryFile(build_image(size, {3: pattern(CLUSTER, 1)}))
    async with opened(file) as disk:
        await disk.discard(3 * CLUSTER, 512)
        assert [extent.kind for extent in await disk.extents(0, size)] == [Kind.UNALLOCATED]


async def test_freed_clusters_go_back_to_the_host() -> None:
    """At a flush, not before, freed clusters are punched out, or cut off at the end."""
    file = RecordingFile(full(10))
    length = file.size()
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.ensure_scanned()
        first = get_entry(file.content, l2_entry_offset(file.content, 2))
        await disk.discard(2 * CLUSTER, 3 * CLUSTER)
        await disk.discard(8 * CLUSTER, 2 * CLUSTER)
        assert file.size() == length
        assert not any(isinstance(change, Punch) for change in file.changes)
        assert await freed(disk) == 3
        assert file.size() == length - 2 * CLUSTER
        assert [change for change in file.changes if isinstance(change, Punch)] == [
            Punch(first, 3 * CLUSTER)
        ]
    assert inspect_image(file.content).leaks == 3


async def test_freed_clusters_are_used_before_the_file_grows() -> None:
    """Freed clusters are used again, the lowest first, and show nothing of their old content."""
    file = MemoryFile(full(10))
    async with opened(file) as disk:
        await disk.discard(2 * CLUSTER, 3 * CLUSTER)
        assert await freed(disk) == 3
        end = disk.statistics().file_bytes
        await disk.write(20 * CLUSTER + 100, b"new")
        await disk.write(30 * CLUSTER, bytes(CLUSTER - 1) + b"x" + pattern(CLUSTER, 60))
        assert disk.statistics().file_bytes == end
        assert await disk.read(20 * CLUSTER, CLUSTER) == bytes(100) + b"new" + bytes(CLUSTER - 103)
        await disk.write(40 * CLUSTER, b"y")
        assert disk.statistics().file_bytes == end + CLUSTER
    found = inspect_image(file.content)
    assert (found.errors, found.leaks) == ((), 0)


async def test_a_freed_cluster_is_not_used_before_the_table_is_durable() -> None:
    """A freed cluster is not used while the table on the disk still refers to it."""
    file = MemoryFile(full(10))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        old = get_entry(file.content, l2_entry_offset(file.content, 2))
        await disk.discard(2 * CLUSTER, CLUSTER)
        await disk.write(20 * CLUSTER, b"a")
        await disk.flush()
        await disk.write(21 * CLUSTER, b"b")
    assert get_entry(file.content, l2_entry_offset(file.content, 20)) != old
    assert get_entry(file.content, l2_entry_offset(file.content, 21)) == old


async def test_a_freed_cluster_is_not_used_during_a_read_of_it() -> None:
    """A read that began before the discard returns the old content, however late it ends."""
    file = FailingFile(MemoryFile(full(10)))
    got: list[bytes] = []
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.read(0, 1)  # from here on the tables are in memory

        async def read() -> None:
            got.append(bytes(await disk.read(2 * CLUSTER, CLUSTER)))

        async with trio.open_nursery() as nursery:
            with file.hold("read") as held:
                nursery.start_soon(read)
                await held.reached.wait()
                await disk.discard(2 * CLUSTER, CLUSTER)
                await disk.flush()
                assert disk.statistics().quarantined_clusters == 1
                await disk.write(20 * CLUSTER, pattern(CLUSTER, 99))
                await disk.flush()
        assert got == [pattern(CLUSTER, 2)]
        assert await freed(disk) == 1


async def test_a_freed_cluster_is_not_used_during_a_write_to_it() -> None:
    """A late write in place does not hit the next owner of the cluster."""
    inner = MemoryFile(full(10))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(3 * CLUSTER, b"z")
        async with trio.open_nursery() as nursery:
            with file.hold("write") as held:
                nursery.start_soon(disk.write, 2 * CLUSTER, b"late" * 1024)
                await held.reached.wait()
                await disk.discard(2 * CLUSTER, CLUSTER)
                await disk.flush()
                await disk.write(20 * CLUSTER, pattern(CLUSTER, 99))
                await disk.flush()
        assert await disk.read(20 * CLUSTER, CLUSTER) == pattern(CLUSTER, 99)
        assert await disk.read(2 * CLUSTER, CLUSTER) == bytes(CLUSTER)


async def test_a_full_file_waits_for_the_quarantine() -> None:
    """A write that only the quarantine stops flushes, waits for it, and completes."""
    size = 8 * CLUSTER
    file = RecordingFile(build_image(size, dict.fromkeys(range(8), b"a")))
    length = file.size()
    async with opened(file) as disk:
        await disk.ensure_scanned()
        for step in range(6):
            await disk.discard(step * CLUSTER, 2 * CLUSTER)
            await disk.write(step * CLUSTER, pattern(2 * CLUSTER, step))
            assert file.size() <= length
    assert len([change for change in file.changes if isinstance(change, Sync)]) >= 6


async def test_without_discard_the_clusters_stay() -> None:
    """With discard off a discarded range reads as zeros and frees no cluster."""
    file = RecordingFile(full(10))
    async with opened(file, options=replace(WRITABLE, discard=False)) as disk:
        before = [extent.kind for extent in await disk.extents(0, SIZE)]
        await disk.discard(100, 5 * CLUSTER)
        assert await disk.read(100, 5 * CLUSTER) == bytes(5 * CLUSTER)
        assert [extent.kind for extent in await disk.extents(0, SIZE)] == before
        assert await freed(disk) == 0
    assert not header_of(file.content).need_check
    assert all(isinstance(change, Write | Sync) for change in file.changes)


@pytest.mark.expect_log("found invalid table entries")
async def test_a_bad_entry_is_not_discarded() -> None:
    """A discard of a bad entry raises its error, logs nothing, and keeps the entry."""
    image = full(10)
    put_entry(image, l2_entry_offset(image, 4), len(image) + CLUSTER)
    async with opened(MemoryFile(image)) as disk:
        await disk.ensure_scanned()
        for start, length in ((0, SIZE), (0, SIZE), (4 * CLUSTER + 10, 20)):
            with pytest.raises(CorruptImageError, match="L2 entry 4"):
                await disk.discard(start, length)


async def test_a_read_only_disk_refuses() -> None:
    """A disk opened read-only refuses discards and changes nothing."""
    file = MemoryFile(full(10), writable=False)
    async with opened(file, options=replace(WRITABLE, writable=False)) as disk:
        with pytest.raises(ReadOnlyError):
            await disk.discard(0, SIZE)
        with pytest.raises(ReadOnlyError):
            await disk.allocate(0, SIZE)


async def test_a_discard_beside_a_write_into_the_same_new_cluster() -> None:
    """A discard and an allocating write of one cluster wait for each other."""
    file = FailingFile(MemoryFile(build_image(SIZE, {0: b"a"})))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(CLUSTER, b"b")
        async with trio.open_nursery() as nursery:
            with file.hold("write") as held:
                nursery.start_soon(disk.write, 5 * CLUSTER, pattern(CLUSTER, 5))
                await held.reached.wait()
                nursery.start_soon(disk.discard, 5 * CLUSTER, CLUSTER)
                await wait_all_tasks_blocked()
        assert await disk.read(5 * CLUSTER, CLUSTER) == bytes(CLUSTER)
        assert await freed(disk) == 0, "its cluster was the last one and is cut off"


async def test_a_discard_up_to_the_end_beside_a_resize() -> None:
    """A write past the old end survives a discard of the last cluster during a resize."""
    size = 9 * CLUSTER + 512
    image = build_image(size, {at: pattern(CLUSTER, at) for at in range(10)})
    file = FailingFile(MemoryFile(image))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        async with trio.open_nursery() as nursery:
            with file.hold("read") as held:
                nursery.start_soon(disk.discard, 0, size)
                await held.reached.wait()

                async def grow_and_write() -> None:
                    await disk.grow(20 * CLUSTER)
                    await disk.write(size, b"behind the old end")
                    await disk.flush()

                nursery.start_soon(grow_and_write)
                await wait_all_tasks_blocked()
        assert await disk.read(size, 18) == b"behind the old end"
        assert not any(await disk.read(0, size))


async def test_a_full_file_waits_for_what_is_being_punched() -> None:
    """A write waits for clusters that are being punched, and the file does not grow."""
    size = 8 * CLUSTER
    inner = MemoryFile(build_image(size, {at: pattern(CLUSTER, at) for at in range(8)}))
    file = FailingFile(inner)
    length = inner.size()
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.discard(2 * CLUSTER, 3 * CLUSTER)
        async with trio.open_nursery() as nursery:
            with file.hold("punch") as held:
                nursery.start_soon(disk.flush)
                await held.reached.wait()
                nursery.start_soon(disk.write, 2 * CLUSTER, pattern(3 * CLUSTER, 50))
                await wait_all_tasks_blocked()
                assert inner.size() == length
        assert inner.size() == length
        assert await disk.read(2 * CLUSTER, 3 * CLUSTER) == pattern(3 * CLUSTER, 50)


@pytest.mark.parametrize("step", ["datasync", "punch"])
async def test_space_on_its_way_back_is_waited_for(step: Literal["datasync", "punch"]) -> None:
    """Writes wait for clusters that are about to become free, and the file does not grow."""
    size = 2000 * CLUSTER
    inner = MemoryFile(build_image(size, dict.fromkeys(range(1000), b"a")))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        for number in (1000, 1200, 1700):
            await disk.write(number * CLUSTER, b"the table is there")
        await disk.flush()
        end = disk.statistics().file_bytes
        await disk.discard(0, 500 * CLUSTER)
        async with trio.open_nursery() as nursery:
            with file.hold(step) as held:
                # This write reclaims clusters itself if no other task does.
                if step == "datasync":
                    nursery.start_soon(disk.write, 1200 * CLUSTER, pattern(20 * CLUSTER, 1))
                else:
                    nursery.start_soon(disk.flush)
                await held.reached.wait()
                for number in range(13, 20):
                    nursery.start_soon(disk.write, number * 100 * CLUSTER, pattern(CLUSTER, number))
                await wait_all_tasks_blocked()
                assert disk.statistics().file_bytes == end
        assert disk.statistics().file_bytes <= end
    assert inspect_image(inner.content).errors == ()


async def test_an_idle_disk_is_left_in_peace() -> None:
    """After a failed write at the end of the file, flushes of an idle disk cost no host call."""
    size = 8 * CLUSTER
    file = FailingFile(MemoryFile(build_image(size, {0: b"a"})))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        file.fail("write", 2)
        with pytest.raises(HostError):
            await disk.write(3 * CLUSTER, pattern(CLUSTER, 1))
        await disk.write(3 * CLUSTER, pattern(5 * CLUSTER, 1))
        await disk.write(CLUSTER, pattern(2 * CLUSTER, 1))
        for _ in range(3):
            await disk.flush()
        before = file.calls["datasync"]
        for _ in range(5):
            await disk.flush()
        assert file.calls["datasync"] == before


async def test_zeros_over_a_range_that_is_being_discarded() -> None:
    """Zeros over a range whose first cluster is discarded meanwhile read as zeros everywhere."""
    file = FailingFile(MemoryFile(full(10)))
    async with opened(file, options=replace(WRITABLE, detect_zeroes="on")) as disk:
        await disk.ensure_scanned()
        extents = await disk._components.layer.lookup(0, 10 * CLUSTER)
        assert len(extents) == 1
        await disk._components.discard.discard(0, CLUSTER)
        await disk._components.write_path.zero_range(0, 10 * CLUSTER)
        assert not any(await disk.read(0, 10 * CLUSTER))


# --- zeros that are written ------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("off", [Kind.DATA]),
        ("on", [Kind.DATA, Kind.ZERO, Kind.UNALLOCATED]),
        ("unmap", [Kind.ZERO, Kind.UNALLOCATED]),
    ],
)
async def test_zeros_that_are_written(
    mode: Literal["off", "on", "unmap"], kinds: list[Kind]
) -> None:
    """Written zeros are stored as data, or as zero clusters, or free clusters, as configured."""
    file = MemoryFile(full(10, backing=b"base"))
    async with opened(file, [BASE], replace(WRITABLE, detect_zeroes=mode)) as disk:
        await disk.write(0, bytes(60 * CLUSTER))
        assert [
            extent.kind for extent in await disk._components.layer.lookup(0, 60 * CLUSTER)
        ] == kinds
        assert await disk.read(0, 60 * CLUSTER) == bytes(60 * CLUSTER)


@pytest.mark.parametrize("mode", ["on", "unmap"])
async def test_zeros_among_data(mode: Literal["on", "unmap"]) -> None:
    """Only whole clusters of zeros become zero clusters; the data around them is written."""
    file = MemoryFile(full(10))
    data = bytearray(pattern(12 * CLUSTER + 300, 3))
    for at in (1, 2, 5, 11):
        data[at * CLUSTER + 50 : (at + 1) * CLUSTER + 150] = bytes(CLUSTER + 100)
    data[8 * CLUSTER : 9 * CLUSTER] = bytes(CLUSTER)
    async with opened(file, options=replace(WRITABLE, detect_zeroes=mode)) as disk:
        await disk.write(3 * CLUSTER - 50, data)
        expected = bytearray(guest_bytes(full(10)))
        expected[3 * CLUSTER - 50 : 3 * CLUSTER - 50 + len(data)] = data
        assert difference(await disk.read(0, SIZE), expected) is None
        kinds = {(await disk.extents(at * CLUSTER, 1))[0].kind for at in (4, 5, 8)}
        assert kinds == {Kind.DATA if mode == "on" else Kind.UNALLOCATED}
        assert (await disk.extents(14 * CLUSTER, 1))[0].kind is Kind.UNALLOCATED
    assert difference(guest_bytes(file.content), expected) is None


# --- places without data ---------------------------------------------------------------


@pytest.mark.parametrize("based", [False, True])
async def test_allocating_keeps_the_content(*, based: bool) -> None:
    """Allocating a range keeps its content, and reserves space on the host."""
    inner = MemoryFile(full(3, backing=b"base") if based else full(3))
    bases = [BASE] if based else []
    expected = guest_bytes(inner.content, *bases)
    file = FailingFile(inner)
    async with opened(file, bases) as disk:
        await disk.discard(CLUSTER, CLUSTER)
        expected = expected[:CLUSTER] + bytes(CLUSTER) + expected[2 * CLUSTER :]
        await disk.allocate(100, SIZE - 150)
        found = {(item.kind, item.depth) for item in await disk.extents(0, SIZE)}
        assert found == {(Kind.DATA, 0)}
        assert difference(await disk.read(0, SIZE), expected) is None
        file.fail("reserve", None, 28)
        with pytest.raises(NoSpaceError):
            await disk.allocate(0, SIZE)
    assert difference(guest_bytes(inner.content, *bases), expected) is None


# --- a host that does not want to ------------------------------------------------------


@pytest.mark.expect_log("punch: Input/output error (while returning space to the host)")
async def test_a_punch_that_fails_costs_only_space() -> None:
    """A failed punch is logged once, and the clusters are used again."""
    file = FailingFile(MemoryFile(full(10)))
    file.fail("punch", None)
    async with opened(file) as disk:
        await disk.discard(0, 4 * CLUSTER)
        assert await freed(disk) == 4
        await disk.discard(5 * CLUSTER, CLUSTER)
        assert await freed(disk) == 5
        end = disk.statistics().file_bytes
        await disk.write(20 * CLUSTER, pattern(5 * CLUSTER, 2))
        assert disk.statistics().file_bytes == end


async def test_space_that_was_only_set_aside_goes_back(tmp_path: Path) -> None:
    """Reserved but unwritten host space, which the host reports as a hole, is punched too."""
    path = tmp_path / "vm.qed"
    await create_image(str(path), 64 << 20)
    async with open_disk(str(path), OpenOptions(writable=True)) as disk:
        await disk.write(0, b"x")
        before = disk.fstat().st_blocks
        await disk.allocate(1 << 20, 8 << 20)
        await disk.write(16 << 20, b"x")
        assert disk.fstat().st_blocks >= before + (8 << 20) // 512
        await disk.discard(1 << 20, 8 << 20)
        await disk.flush()
        assert disk.fstat().st_blocks < before + (1 << 20) // 512


async def test_a_full_host_is_found_out_before_the_table_is_changed() -> None:
    """Without host space for its table a write is refused, its cluster is freed, a flush works."""
    inner = MemoryFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        end = disk.statistics().file_bytes
        file.fail("reserve", None, 28)
        for request in (lambda: disk.write(9 * CLUSTER, b"x"), lambda: disk.discard(0, CLUSTER)):
            with pytest.raises(NoSpaceError):
                await request()
        await disk.flush()
        assert disk.statistics().file_bytes == end
        assert disk.statistics().free_clusters == 0
        file.heal()
        await disk.write(9 * CLUSTER, b"x")
        await disk.discard(0, CLUSTER)
    assert inspect_image(inner.content).errors == ()


async def test_clusters_of_tables_that_could_not_be_written_stay_in_quarantine() -> None:
    """A failed flush frees no cluster, and the next successful one does."""
    file = FailingFile(MemoryFile(full(10)))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.discard(0, 3 * CLUSTER)
        file.fail("write", 1, 28)
        with pytest.raises(HostError):
            await disk.flush()
        assert disk.statistics().quarantined_clusters == 3
        assert disk.statistics().free_clusters == 0
        assert await freed(disk) == 3


async def test_discards_in_steps_within_the_table_cache() -> None:
    """A discard over more tables than the cache holds writes tables back on the way."""
    geometry = Geometry(CLUSTER, 1)
    size = 6 * geometry.table_span
    clusters = {at * 300: b"x" for at in range(size // CLUSTER // 300)}
    file = MemoryFile(build_image(size, clusters))
    async with opened(file, options=replace(WRITABLE, cache_bytes=0)) as disk:
        await disk.discard(0, size)
        free = await freed(disk)
        used = 2 * CLUSTER + 6 * geometry.table_bytes
        assert disk.statistics().file_bytes == used + free * CLUSTER
        assert not any(await disk.read(0, size))
    assert inspect_image(file.content).errors == ()


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("how", ["discard", "empty", "shrink"])
@pytest.mark.parametrize("known", [False, True])
async def test_many_clusters_in_no_order(
    how: Literal["discard", "empty", "shrink"],
    *,
    based: bool,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clusters in random order are dropped a table at a time, and all become free."""
    monkeypatch.setattr(quarantine, "_MAX_SCATTERED_CLUSTERS", 300)
    chance, count = random.Random(3), 1200
    numbers = chance.sample(range(count), count)
    clusters: dict[int, bytes | int] = {n: pattern(CLUSTER, n) for n in numbers if n % 7}
    clusters |= {n: ZERO for n in numbers if n % 14 == 0}
    base = pattern(700 * CLUSTER, 5) if based else b""
    image = build_image(count * CLUSTER, clusters, backing=b"base" if based else b"")
    before = guest_bytes(image, base)
    first, last = (0, count) if how == "empty" else (9, count)
    expected = bytearray(before)
    expected[first * CLUSTER :] = bytes(len(before) - first * CLUSTER)
    if how == "empty" and based:
        expected[: len(base)] = base
    file = MemoryFile(image)
    async with opened(file, [base] if based else []) as disk:
        if known:
            await disk.ensure_scanned()
        if how == "discard":
            await disk.discard(first * CLUSTER, (last - first) * CLUSTER)
        elif how == "empty":
            await disk.empty()
        else:
            await disk.shrink(first * CLUSTER, force=True)
            del expected[first * CLUSTER :]
        assert await disk.read(0, disk.size) == expected
        free = await freed(disk)
        statistics = disk.statistics()
        used = len({n for n in clusters if n < first and clusters[n] != ZERO})
        tables = 0 if how == "empty" else 1 if how == "shrink" else 3
        assert statistics.file_bytes == (2 + used + tables + free) * CLUSTER
    assert inspect_image(file.content).errors == ()
    assert guest_bytes(file.content, base) == expected
