"""Fast allocation: what it writes to new clusters, and what it leaves to the slow path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from unittest.mock import patch

import pytest
import trio

from qedfuse.disk.options import OpenOptions
from qedfuse.disk.space.filelength import MIN_GROWTH_BYTES
from tests.support.disks import (
    build_image,
    difference,
    get_entry,
    guest_bytes,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
)
from tests.support.hostfiles import MemoryFile, RecordingFile, Truncate, Write

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk

CLUSTER: Final = 4096
SIZE: Final = 1024 * CLUSTER
BASE: Final = pattern(SIZE, 77)


def image(clusters: dict[int, bytes | int] | None = None, **options: int | bytes) -> RecordingFile:
    """Return a cached file; cluster 500 has data, so that its L2 table exists."""
    content = build_image(SIZE, {500: b"there", **(clusters or {})}, **options)  # type: ignore[arg-type]
    file = RecordingFile(content)
    file.in_page_cache = True
    return file


async def make_ready(disk: Disk) -> None:
    """Make the change that sets NEED_CHECK and reserves space for the table."""
    await disk.ensure_scanned()
    await disk.write(501 * CLUSTER, b"first")
    await disk.read(0, disk.size)


async def test_new_clusters_get_only_the_data() -> None:
    """In never-written clusters only the data is written, since the rest reads as zeros."""
    file = image()
    async with opened(file) as disk:
        await make_ready(disk)
        before = len(file.changes)
        assert disk.try_write(7 * CLUSTER + 100, b"new")
        assert disk.try_write(10 * CLUSTER + 5, b"x" * 3 * CLUSTER)
        changes = file.changes[before:]
        assert [type(change) for change in changes] == [Write, Write], "no table, no length"
        assert [len(change.data) for change in changes] == [3, 3 * CLUSTER]  # type: ignore[union-attr]
        assert bytes(await disk.read(7 * CLUSTER + 98, 7)) == b"\0\0new\0\0"
    after = guest_bytes(file.content)
    assert after[7 * CLUSTER : 8 * CLUSTER] == bytes(100) + b"new" + bytes(CLUSTER - 103)
    assert after[10 * CLUSTER : 14 * CLUSTER].strip(b"\0") == b"x" * 3 * CLUSTER
    assert inspect_image(file.content).errors == ()
    assert inspect_image(file.content).leaks == 0


async def test_reused_clusters_are_written_whole() -> None:
    """A cluster that is used again is written whole and leaves the punch queue."""
    file = image(dict.fromkeys(range(5), b"s" * CLUSTER))
    file.can_punch = False
    async with opened(file) as disk:
        await make_ready(disk)
        await disk.discard(0, 4 * CLUSTER)
        await disk.flush()
        # What is in the buffer must not get into the file either.
        assert bytes(disk.try_read(4 * CLUSTER, CLUSTER) or b"") == b"s" * CLUSTER
        assert disk.try_write(9 * CLUSTER + 1, b"new")
        assert bytes(disk.try_read(4 * CLUSTER, CLUSTER) or b"") == b"s" * CLUSTER
        assert disk.try_write(20 * CLUSTER + 1, b"n" * (2 * CLUSTER - 2))
        file.can_punch = True
        await disk.flush()
        assert bytes(await disk.read(9 * CLUSTER, CLUSTER)) == b"\0new" + bytes(CLUSTER - 4)
        got = bytes(await disk.read(20 * CLUSTER, 2 * CLUSTER))
        assert got == b"\0" + b"n" * (2 * CLUSTER - 2) + b"\0"


async def test_free_clusters_that_lie_apart_are_no_run() -> None:
    """Free clusters that are not contiguous are not taken for one run, and stay free."""
    file = image(dict.fromkeys(range(9), b"s" * CLUSTER))
    async with opened(file) as disk:
        await make_ready(disk)
        for number in (1, 3, 5):
            await disk.discard(number * CLUSTER, CLUSTER)
        await disk.flush()
        assert disk.statistics().free_clusters == 3
        assert not disk.try_write(20 * CLUSTER, b"x" * 2 * CLUSTER)
        assert disk.statistics().free_clusters == 3
        assert disk.try_write(20 * CLUSTER, b"x")
        assert disk.statistics().free_clusters == 2


async def test_old_and_new_clusters_in_one_write() -> None:
    """Each run of one write goes in place, into new clusters, or over zero clusters."""
    file = image({2: b"a" * CLUSTER, 3: b"b" * CLUSTER, 5: 1, 6: b"c" * CLUSTER, 7: b"d" * CLUSTER})
    async with opened(file) as disk:
        await make_ready(disk)
        expected = bytearray(await disk.read(0, 12 * CLUSTER))
        data = pattern(9 * CLUSTER, 3)
        before = len(file.changes)
        assert disk.try_write(CLUSTER + 100, data)
        expected[CLUSTER + 100 : 10 * CLUSTER + 100] = data
        assert len(file.changes) - before == 6, "one write for each run"
        assert difference(await disk.read(0, 12 * CLUSTER), expected) is None
    assert difference(guest_bytes(file.content)[: 12 * CLUSTER], expected) is None


async def test_an_odd_tail_is_cut_off_first() -> None:
    """An odd tail of the file is cut off before a cluster is allocated there."""
    file = image()
    file.content += b"t" * 1000
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(500 * CLUSTER, b"x")
        await disk.allocate(500 * CLUSTER, CLUSTER)
        disk._components.layer.tables._reserved.add(disk._components.layer.cached_slice(0).offset)  # type: ignore[union-attr]
        await disk._components.needcheck._header_store.change(
            lambda header: header.with_need_check(value=True)
        )
        assert not disk.try_write(9 * CLUSTER, b"x")
        await disk.write(9 * CLUSTER, b"x")
        assert disk.try_write(10 * CLUSTER, b"x")


async def test_around_the_data_the_base_is_copied() -> None:
    """Around the data the base is copied, except where a zero cluster hides it."""
    file = image({3: 1}, backing=b"base")
    async with opened(file, [BASE]) as disk:
        await make_ready(disk)
        expected = bytearray(guest_bytes(file.content, BASE))
        for start, data in ((9 * CLUSTER + 5, b"new"), (3 * CLUSTER + 5, b"new")):
            assert disk.try_write(start, data)
            expected[start : start + len(data)] = data
        # A whole cluster needs no bytes of the base; a write to parts of two is left to the
        # slow path.
        assert disk.try_write(20 * CLUSTER, b"w" * 2 * CLUSTER)
        expected[20 * CLUSTER : 22 * CLUSTER] = b"w" * 2 * CLUSTER
        assert not disk.try_write(30 * CLUSTER + 1, b"w" * CLUSTER)
        expected[501 * CLUSTER : 501 * CLUSTER + 5] = b"first"
        assert difference(await disk.read(0, SIZE), expected) is None


@pytest.mark.parametrize("short", [100 * 512, 96 * 512])
async def test_what_the_base_has_past_the_end_is_not_copied(short: int) -> None:
    """Bytes of the base past the end of the disk are not copied; a short base reads as zeros."""
    file = MemoryFile(build_image(100 * 512, {0: b"a"}, backing=b"base"))
    file.in_page_cache = True
    async with opened(file, [BASE if short == 100 * 512 else BASE[: short + 7]]) as disk:
        await disk.ensure_scanned()
        await disk.write(CLUSTER, b"b")
        await disk.read(0, disk.size)
        at = 100 * 512 - 512
        if disk.try_write(at, b"end"):
            assert short == 100 * 512, "a base that ends within a cluster is left to the slow path"
        else:
            await disk.write(at, b"end")
        await disk.grow(SIZE)
        got = bytes(await disk.read(96 * 512, 16 * CLUSTER))
    shown = BASE[96 * 512 : at] if short == 100 * 512 else BASE[96 * 512 : short + 7]
    start = shown.ljust(at - 96 * 512, b"\0") + b"end"
    if short == 100 * 512:
        start += BASE[at + 3 : 100 * 512]
    assert got == start.ljust(16 * CLUSTER, b"\0")


async def test_the_file_grows_ahead() -> None:
    """The file grows once for many clusters."""
    file = image()
    async with opened(file) as disk:
        await make_ready(disk)
        before = len(file.changes)
        for number in range(400):
            assert disk.try_write(number * CLUSTER, b"x")
        grown = [change for change in file.changes[before:] if isinstance(change, Truncate)]
        assert 1 <= len(grown) <= 400 * CLUSTER // MIN_GROWTH_BYTES + 1
        assert len(file.content) >= 400 * CLUSTER


async def test_writes_that_are_left_to_the_slow_path() -> None:
    """A write is left if its table is not ready, its cluster locked or the budget used up."""
    file = image({0: b"s", 1: b"s", 2: b"s", 700: b"s"})
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.read(0, disk.size)
        assert not disk.try_write(9 * CLUSTER, b"x"), (
            "NEED_CHECK is not set, no space is reserved for the table"
        )
        await make_ready(disk)
        assert not disk.try_write(701 * CLUSTER, b"x"), "no space is reserved for this slice"
        async with disk._components.write_path.allocation_lock.hold(9 * CLUSTER, 10 * CLUSTER):
            assert not disk.try_write(8 * CLUSTER, b"x" * 2 * CLUSTER)
            assert disk.try_write(10 * CLUSTER, b"x")
        async with disk._components.write_path.allocation_lock.hold(4 * CLUSTER, 5 * CLUSTER):
            assert not disk.try_write(0, b"x" * 5 * CLUSTER), "another task holds the last cluster"
        assert not disk.try_write(SIZE - 1, b"xx")
        disk._components.table_writer._dirty_budget = 0
        assert not disk.try_write(12 * CLUSTER, b"x")
        disk._components.table_writer._dirty_budget = 1 << 20
        end = disk.statistics().file_bytes
        async with disk._components.length.lock:
            done = [disk.try_write(number * CLUSTER, b"x") for number in range(20, 400)]
            assert not all(done), "growth waits for the lock of the file length"
        file.in_page_cache = False
        assert not disk.try_write(450 * CLUSTER, b"x")
        assert disk.statistics().file_bytes == end + sum(done) * CLUSTER


async def test_no_cluster_is_used_while_it_is_being_punched() -> None:
    """While a punch runs, a write that needs space is left to the slow path, which waits for it."""
    file = image(dict.fromkeys(range(300), b"s" * CLUSTER))
    async with opened(file) as disk:
        await make_ready(disk)
        disk._components.reclaim.punching_clusters = 1
        assert not disk.try_write(400 * CLUSTER, b"x")
        disk._components.reclaim.punching_clusters = 0
        assert disk.try_write(400 * CLUSTER, b"x")
        # With this many clusters in quarantine a flush is made before the file grows.
        await disk.discard(0, 290 * CLUSTER)
        assert not disk.try_write(401 * CLUSTER, b"x")
        await disk.flush()
        assert disk.try_write(401 * CLUSTER, b"x")


async def test_a_failed_write_gives_the_run_back() -> None:
    """A failed write returns its clusters and leaves the table unchanged."""
    file = image()
    async with opened(file) as disk:
        await make_ready(disk)
        end = disk.statistics().file_bytes
        with patch.object(file, "try_write", return_value=False):
            assert not disk.try_write(9 * CLUSTER, b"x")
        assert disk.statistics().file_bytes == end
        assert bytes(disk.try_read(9 * CLUSTER, 5) or b"") == bytes(5)
        assert disk.try_write(9 * CLUSTER, b"x")
        assert disk.statistics().file_bytes == end + CLUSTER


async def test_a_fast_allocation_postpones_clearing_need_check(
    autojump_clock: trio.testing.MockClock,  # noqa: ARG001  pytest-trio uses the clock
) -> None:
    """NEED_CHECK is cleared some seconds after the last fast allocation."""
    file = image()
    async with opened(file, options=OpenOptions(writable=True)) as disk:
        await make_ready(disk)
        for number in range(10):
            await trio.sleep(4)
            assert disk.header.need_check
            assert disk.try_write(number * CLUSTER, b"x")
        await trio.sleep(11)
        assert not disk.header.need_check
        assert get_entry(file.content, l2_entry_offset(file.content, 9)) > 1, "not durable"
        assert not disk.try_write(20 * CLUSTER, b"x"), "the bit has to be set first"
