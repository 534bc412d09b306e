"""A disk adopts its free list at opening, invalidates it before a change, writes it at a close."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.space import scan
from qedfuse.disk.space.freemap import FreeMap
from qedfuse.disk.state import freelistruns, persistentfreelist
from qedfuse.errors import HostError, ReadOnlyError, UsageError
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
from tests.support.freelists import DESCRIPTOR, leaked_runs, listed, put_list, set_bit
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Sync, Write

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk

CLUSTER: Final = 4096
SIZE: Final = 700 * CLUSTER
ON: Final = replace(WRITABLE, free_list="on")
OFF: Final = replace(WRITABLE, free_list="off")
SPAN: Final = 512
"""Clusters that a table covers."""


def image(leaked: int = 20, **options: int) -> bytearray:
    """Return an image with data, and with single unreferenced clusters between them."""
    numbers = range(2 * leaked + 2)
    content = build_image(SIZE, {n: pattern(CLUSTER, n) for n in numbers}, **options)  # type: ignore[arg-type]
    for number in numbers[1:-1:2]:
        put_entry(content, l2_entry_offset(content, number), 0)
        assert leaked_runs(content)
    assert len(leaked_runs(content)) == leaked
    return content


def with_list(leaked: int = 20, **options: int) -> bytearray:
    """Return the same image with a true list."""
    content = image(leaked, **options)
    put_list(content)
    return content


def free_of(disk: Disk) -> list[tuple[int, int]]:
    """List the clusters that a disk takes for free."""
    return list(disk._components.allocator.free.runs())


def check_true(content: bytes | bytearray) -> None:
    """Assert that an image is sound, and that its list, if it has one, is true and complete."""
    assert inspect_image(content).errors == ()
    runs = listed(content)
    if runs is not None:
        assert not header_of(content).need_check
        assert runs == leaked_runs(content)


async def test_a_clean_close_writes_the_list() -> None:
    """A clean close lists all unreferenced clusters, and the file does not grow for it."""
    file = RecordingFile(image())
    async with opened(file, options=ON) as disk:
        await disk.discard(0, CLUSTER)
        await disk.discard(4 * CLUSTER, 3 * CLUSTER)
    assert len(file.content) <= len(file.initial)
    runs = listed(file.content)
    assert runs is not None
    assert sum(count for _, count in runs) == 20 + 1 + 2
    check_true(file.content)


async def test_the_bit_comes_after_a_datasync_that_covers_the_list() -> None:
    """The feature bit is written after a datasync that covers the list, and is made durable."""
    file = RecordingFile(image(300))
    async with opened(file, options=ON) as disk:
        await disk.discard(0, CLUSTER)
    assert len(leaked_runs(file.content)) > 254, "one list cluster is not enough"
    last = file.changes[-6:]
    assert [type(change) for change in last] == [Write, Write, Write, Sync, Write, Sync]
    assert [change.offset for change in last if isinstance(change, Write)][2:] == [DESCRIPTOR, 0]
    states = file.prefixes()
    before = next(content for number, content in states if number == len(file.changes) - 6)
    assert not header_of(before).need_check


async def test_a_list_spares_the_scan_until_a_table_changes() -> None:
    """With a list no table is read by a scan until the first table change, which uses the list."""
    content = with_list()
    runs = leaked_runs(content)
    file = MemoryFile(content)
    async with opened(file) as disk:
        await disk.write(0, pattern(CLUSTER, 3))
        await wait_all_tasks_blocked()
        assert disk.statistics().free_clusters is None
        reads = file.counts["read"]
        await wait_all_tasks_blocked()
        assert file.counts["read"] == reads
        await disk.write(100 * CLUSTER, pattern(CLUSTER, 7))
        assert disk.statistics().free_clusters == 19
        await disk.flush()
        assert get_entry(file.content, l2_entry_offset(file.content, 100)) == runs[0][0] * CLUSTER
        assert listed(file.content) is None
    # Kept, since the image had one.
    assert listed(file.content) == runs[1:]
    check_true(file.content)


async def test_writes_in_place_bring_the_same_list_back_without_a_scan() -> None:
    """After writes in place only, the close writes the same list again without a scan."""
    for content in (with_list(), with_false_list()):
        file = RecordingFile(content)
        async with opened(file) as disk:
            await disk.write(0, pattern(CLUSTER, 3))
        assert listed(file.content) == listed(content)
        places = get_entry(content, l2_entry_offset(content, 0))
        written = [change.offset for change in file.changes if isinstance(change, Write)]
        assert written == [0, DESCRIPTOR, places, DESCRIPTOR, 0]


async def test_a_long_scan_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """During a long scan the file grows, and after it listed clusters are used."""
    monkeypatch.setattr(scan, "_SHORT_SCAN_BYTES", 0)
    content = with_list()
    runs = leaked_runs(content)
    file = MemoryFile(content)
    async with opened(file) as disk:
        await disk.write(100 * CLUSTER, pattern(CLUSTER, 7))
        await wait_all_tasks_blocked()
        await disk.write(101 * CLUSTER, pattern(CLUSTER, 8))
        await disk.flush()
        assert get_entry(file.content, l2_entry_offset(file.content, 100)) == len(content)
        assert get_entry(file.content, l2_entry_offset(file.content, 101)) == runs[0][0] * CLUSTER
    check_true(file.content)
    assert listed(file.content) == runs[1:]


@pytest.mark.parametrize("options", [WRITABLE, ON])
async def test_a_disk_that_is_not_changed_keeps_its_list(options: object) -> None:
    """Reading, flushing and closing change no byte of an image with a list."""
    file = RecordingFile(with_list())
    async with opened(file, options=options) as disk:  # type: ignore[arg-type]
        assert await disk.read(0, disk.size) == guest_bytes(file.initial)
        await disk.flush()
        await wait_all_tasks_blocked()
    assert file.changes == []


async def test_a_reader_ignores_the_list() -> None:
    """A disk opened read-only ignores the list, true or not."""
    for content in (with_list(), image()):
        set_bit(content)
        file = MemoryFile(content, writable=False)
        async with opened(file, options=replace(WRITABLE, writable=False)) as disk:
            assert await disk.read(0, disk.size) == guest_bytes(content)


@pytest.mark.parametrize("change", ["write", "discard", "resize", "allocate", "in place"])
async def test_the_list_is_invalid_before_the_first_change(change: str) -> None:
    """The header without the feature bit is durable before anything else is written."""
    file = RecordingFile(with_list(autoclear=6))
    async with opened(file) as disk:
        if change == "write":
            await disk.write(200 * CLUSTER, b"x")
        elif change == "in place":
            await disk.write(0, b"x")
        elif change == "discard":
            await disk.discard(0, CLUSTER)
        elif change == "resize":
            await disk.grow(SIZE + CLUSTER)
        else:
            await disk.allocate(200 * CLUSTER, 5)
        first, second, third = file.changes[:3]
        assert isinstance(first, Write)
        assert first.offset == 0
        assert not header_of(first.data).has_free_list
        assert not header_of(first.data).autoclear_features
        assert isinstance(second, Sync)
        assert third == Write(DESCRIPTOR, bytes(512))
        await disk.flush()
    check_true(file.content)
    assert listed(file.content)


@pytest.mark.parametrize("together", [False, True])
async def test_the_bound_holds_while_a_long_scan_is_under_way(
    monkeypatch: pytest.MonkeyPatch, *, together: bool
) -> None:
    """A write that may not grow the file waits for the clusters that the scan finds."""
    monkeypatch.setattr(scan, "_SHORT_SCAN_BYTES", 0)
    clusters, data, leaked = 60, 22, 20
    numbers = range(data + leaked)
    content = build_image(clusters * CLUSTER, {n: pattern(CLUSTER, n) for n in numbers})
    for number in numbers[1 : 2 * leaked : 2]:
        put_entry(content, l2_entry_offset(content, number), 0)
    put_list(content)
    expected = b"".join(pattern(CLUSTER, n + 1) for n in range(clusters))
    file = MemoryFile(content)
    async with opened(file) as disk:
        bound = disk.statistics().bound_bytes
        assert len(content) < bound < len(content) + leaked * CLUSTER
        if together:
            async with trio.open_nursery() as nursery:
                for n in range(clusters):
                    nursery.start_soon(disk.write, n * CLUSTER, pattern(CLUSTER, n + 1))
        else:
            await disk.write(0, expected)
        assert await disk.read(0, disk.size) == expected
        await disk.flush()
        assert len(file.content) <= bound
    check_true(file.content)
    assert guest_bytes(file.content) == expected


async def test_off_drops_the_list_and_gives_its_clusters_back() -> None:
    """free_list=off clears the bit and punches out the clusters of the list."""
    content = with_list()
    file = MemoryFile(content)
    async with opened(file, options=OFF) as disk:
        assert listed(file.content) is None
        await disk.ensure_scanned()
        assert free_of(disk) == leaked_runs(content)
    assert not any(file.content[DESCRIPTOR : DESCRIPTOR + 512])
    place = leaked_runs(content)[0][0] * CLUSTER
    assert not any(file.content[place : place + CLUSTER])
    assert guest_bytes(file.content) == guest_bytes(content)
    check_true(file.content)


async def test_no_free_cluster_no_list() -> None:
    """Without free clusters the bit is clear."""
    content = image(1)
    put_list(content)
    file = MemoryFile(content)
    async with opened(file) as disk:
        await disk.write(200 * CLUSTER, pattern(CLUSTER, 1))
    assert listed(file.content) is None
    assert inspect_image(file.content).leaks == 0


@pytest.mark.parametrize("kept", ["keep", "on"])
@pytest.mark.expect_log("free list: descriptor checksum: found")
async def test_a_broken_list_is_dropped_and_found_again_by_a_scan(kept: str) -> None:
    """A defective list is dropped durably at opening, and the close writes a new one."""
    content = with_list()
    content[DESCRIPTOR + 20] ^= 1
    file = MemoryFile(content)
    options = replace(WRITABLE, free_list=kept)  # type: ignore[arg-type]
    async with opened(file, options=options) as disk:
        assert listed(file.content) is None
        await disk.ensure_scanned()
        assert free_of(disk) == leaked_runs(content)
    assert listed(file.content) == leaked_runs(content)
    check_true(file.content)


@pytest.mark.parametrize("nth", [3, 4, 5])
@pytest.mark.expect_log("the list is dropped, and the tables are scanned instead")
async def test_a_list_that_the_host_cannot_read_is_dropped(nth: int) -> None:
    """A list whose descriptor or clusters cannot be read is dropped."""
    content = with_list()
    inner = MemoryFile(content)
    file = FailingFile(inner)
    file.fail("read", nth)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        assert free_of(disk) == leaked_runs(content)
    assert listed(inner.content) == leaked_runs(content)


@pytest.mark.expect_log("found NEED_CHECK and the bit of the list set")
async def test_need_check_beside_a_list_drops_it() -> None:
    """A list in an image with NEED_CHECK is dropped."""
    content = with_list()
    content[16] |= 2
    file = MemoryFile(content)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        assert free_of(disk) == leaked_runs(content)
    check_true(file.content)


UNREAD: Final = 2 * SPAN
"""First guest cluster of a table that is not read before the damage would be done."""


def with_false_list(place: int = 0) -> bytearray:
    """Build an image whose list, with right checksums, names seven clusters that are in use.

    ``place`` is where the list lies itself: 0 is a free cluster, the others are in use.

    They belong to guest clusters from ``UNREAD + 1`` on, and lie directly before the last
    cluster of the file, which belongs to guest cluster 1.  Before them lies a free one.
    """
    numbers = (0, *range(UNREAD, UNREAD + 8), 1)
    content = build_image(3 * SPAN * CLUSTER, {n: pattern(CLUSTER, n) for n in numbers})
    first = get_entry(content, l2_entry_offset(content, UNREAD)) // CLUSTER
    put_entry(content, l2_entry_offset(content, UNREAD), 0)
    put_list(content, [(first, 8)], [first + place])
    assert (first + 9) * CLUSTER == len(content)
    return content


@pytest.mark.expect_log("found 7 clusters listed as free to which table entries refer")
@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("act", ["write", "discard", "discard and write", "compact"])
async def test_a_false_list_destroys_no_data(act: str, place: int) -> None:
    """Used clusters that a false list names are not allocated, cut off or punched."""
    content = with_false_list(place)
    expected = bytearray(guest_bytes(content))
    file = MemoryFile(content)
    async with opened(
        file, options=replace(WRITABLE, compact="full" if act == "compact" else "auto")
    ) as disk:
        if "discard" in act:
            await disk.discard(CLUSTER, CLUSTER)
            expected[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
            await disk.flush()
        if act != "discard":
            for n in range(10, 30):
                await disk.write(n * CLUSTER, pattern(CLUSTER, n))
                expected[n * CLUSTER : (n + 1) * CLUSTER] = pattern(CLUSTER, n)
            await disk.flush()
    assert difference(guest_bytes(file.content), expected) is None
    check_true(file.content)


@given(st.integers(0, 1 << 32))
def test_a_map_of_runs_of_any_length(seed: int) -> None:
    """The map of a list is right for runs of any length and alignment, across blocks."""
    chance = random.Random(seed)
    runs, at = [], 20
    for _ in range(chance.randrange(1, 60)):
        at += chance.choice((1, 2, 9, 4000, 5000))
        count = chance.choice((1, 1, 2, 5, 300, 4096, 9000))
        runs.append((at, count))
        at += count
    clusters = FreeMap(chance.choice((1, 2, 8)), chance.randrange(20))
    trio.run(freelistruns.add_runs, clusters, np.array(runs, np.uint64))
    one_by_one = FreeMap(clusters.table_clusters, -clusters.alignment % clusters.table_clusters)
    for run in runs:
        one_by_one.add(*run)
    assert list(clusters.runs()) == runs
    assert clusters.slots == one_by_one.slots


async def test_entries_for_allocated_listed_clusters_are_no_contradiction() -> None:
    """A table that is read again may refer to a listed cluster that was allocated meanwhile."""
    file = MemoryFile(with_list())
    async with opened(file, options=replace(WRITABLE, cache_bytes=0)) as disk:
        for n in range(15):
            await disk.write((100 + n) * CLUSTER, pattern(CLUSTER, n))
            await disk.flush()
            assert await disk.read((100 + n) * CLUSTER, CLUSTER) == pattern(CLUSTER, n)
            if n % 3 == 0:
                await disk.discard((100 + n) * CLUSTER, CLUSTER)
                await disk.flush()
        for offset in range(0, len(file.content), CLUSTER):
            disk._components.store.drop((id(disk._components.layer.tables), offset))
        assert await disk.read(101 * CLUSTER, CLUSTER) == pattern(CLUSTER, 1)
    check_true(file.content)


async def test_a_name_over_the_descriptor_is_refused_in_one_line() -> None:
    """free_list=on is refused in one line if the backing name overlaps the descriptor."""
    content = build_image(SIZE, header_size=2, backing=b"n" * 600)
    content[56:60] = (DESCRIPTOR - 300).to_bytes(4, "little")
    content[DESCRIPTOR - 300 : DESCRIPTOR + 300] = b"n" * 600
    content[64:664] = bytes(600)
    before = bytes(content)
    file = MemoryFile(content)
    expected = (
        "image: free list: found the backing file name in bytes 3584 to 4095 of the header's "
        "cluster, expected unused bytes"
    )
    with pytest.raises(UsageError) as caught:
        async with opened(file, [b""], ON):
            pass
    assert str(caught.value) == expected
    assert file.content == before


@pytest.mark.expect_log("the backing file name in its bytes")
async def test_a_name_over_the_descriptor_is_not_wiped() -> None:
    """Dropping a list clears the bit and keeps a backing name over the descriptor."""
    content = build_image(SIZE, header_size=2, backing=b"n" * 600)
    content[56:60] = (DESCRIPTOR - 300).to_bytes(4, "little")
    content[DESCRIPTOR - 300 : DESCRIPTOR + 300] = b"n" * 600
    content.extend(bytes(CLUSTER))
    set_bit(content)
    file = MemoryFile(content)
    async with opened(file, [b""], UNCOMPACTED) as disk:
        await disk.write(0, b"x" * CLUSTER)
        await disk.write(CLUSTER, b"x" * CLUSTER)
        await disk.discard(0, CLUSTER)
    assert inspect_image(file.content).leaks == 1
    assert listed(file.content) is None
    assert file.content[64:CLUSTER] == content[64:CLUSTER]


async def test_foreign_bytes_at_the_descriptor_are_kept() -> None:
    """Foreign bytes at the offset of the descriptor are not overwritten."""
    content = image()
    content[DESCRIPTOR + 77] = 1
    with pytest.raises(UsageError, match="found unknown data in bytes 3584 to 4095"):
        async with opened(MemoryFile(content), options=ON):
            pass
    content[DESCRIPTOR : DESCRIPTOR + 8] = b"QEDFLIST"
    file = MemoryFile(content)
    async with opened(file, options=ON):
        pass
    check_true(file.content)
    assert listed(file.content)


async def test_more_runs_than_a_list_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more runs than the limit no list is written."""
    monkeypatch.setattr(persistentfreelist, "MAX_RUNS", 19)
    file = MemoryFile(image())
    async with opened(file, options=ON):
        pass
    assert listed(file.content) is None
    check_true(file.content)


@pytest.mark.expect_log("while returning space to the host")
async def test_a_file_that_cannot_be_cut_gets_no_list() -> None:
    """If the file cannot be truncated no list is written."""
    content = image()
    content.extend(bytes(5 * CLUSTER))
    inner = MemoryFile(content)
    file = FailingFile(inner)
    file.fail("truncate", None)
    async with opened(file, options=ON):
        pass
    assert listed(inner.content) is None
    async with opened(MemoryFile(inner.content), options=ON) as disk:
        await disk.ensure_scanned()
        assert free_of(disk) == leaked_runs(image())


@pytest.mark.expect_log("found invalid table entries")
@pytest.mark.parametrize("changed", [False, True], ids=["unchanged", "changed"])
async def test_an_image_with_wild_entries_gets_no_list(*, changed: bool) -> None:
    """An image with bad entries gets no list."""
    content = image()
    put_entry(content, l2_entry_offset(content, 300), 1 << 40)
    file = MemoryFile(content)
    async with opened(file, options=ON) as disk:
        await disk.ensure_scanned()
        if changed:
            await disk.write(301 * CLUSTER, b"x")
    assert header_of(file.content).need_check == changed
    assert listed(file.content) is None


@pytest.mark.expect_log("while writing the free list: the image is closed without")
async def test_a_full_host_costs_the_list_only() -> None:
    """On a full host the close is clean, without a list."""
    inner = MemoryFile(with_list())
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.discard(0, CLUSTER)
        await disk.flush()
        await disk._components.needcheck.clear()
        await disk.flush()
        file.fail("write", 1, 28)
    assert listed(inner.content) is None
    assert not header_of(inner.content).need_check
    check_true(inner.content)


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("action", ["write", "datasync"])
async def test_failures_leave_no_false_list(
    action: str, nth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever write or datasync fails, a valid list is true."""
    caplog.set_level(logging.CRITICAL, "qedfuse")
    inner = MemoryFile(with_list())
    file = FailingFile(inner)
    file.fail(action, nth)  # type: ignore[arg-type]
    try:
        async with opened(file) as disk:
            for number in (0, 50, 51):
                await disk.write(number * CLUSTER, pattern(CLUSTER, 1))
                await disk.flush()
                await disk.discard(number * CLUSTER, CLUSTER)
    except* (HostError, ReadOnlyError):
        pass
    check_true(inner.content)


@pytest.mark.parametrize("seed", range(6))
async def test_crashes_leave_no_false_list(seed: int) -> None:
    """After any prefix of the writes and any power failure, a valid list is true."""
    choice = random.Random(seed)
    file = RecordingFile(with_list(280) if seed == 0 else with_list())
    for _ in range(3):
        async with opened(file, options=choice.choice([WRITABLE, ON, OFF])) as disk:
            for _ in range(6):
                number = choice.randrange(699)
                if choice.random() < 0.5:
                    await disk.write(number * CLUSTER, pattern(2 * CLUSTER, number))
                else:
                    await disk.discard(number * CLUSTER, 2 * CLUSTER)
                if choice.random() < 0.3:
                    await disk.flush()
        file.reopen()
    seen = set()
    for number, content in file.prefixes():
        check_true(content)
        seen.add(listed(content) is None)
        for keep in (0.2, 0.8):
            check_true(file.power_loss(number, choice, keep))
    assert seen == {True, False}
