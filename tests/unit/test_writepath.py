"""Reads and writes: what a request leaves in the image, and what it must not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import HostError, NoSpaceError, PastEndError, ReadOnlyError
from qedfuse.ondisk.constants import ZERO
from tests.support.disks import (
    WRITABLE,
    build_image,
    difference,
    get_entry,
    guest_bytes,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
)
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Write

CLUSTER = 4096
BASE = bytes([0xAA]) * (8 * CLUSTER)


@pytest.mark.parametrize("flushed", [True, False])
async def test_small_write_into_zero_cluster_keeps_the_rest_zero(*, flushed: bool) -> None:
    """A small write into a zero cluster is surrounded by zeros, not by the base."""
    file = MemoryFile(build_image(8 * CLUSTER, {2: ZERO, 3: b"data"}, backing=b"base"))
    async with opened(file, [BASE]) as disk:
        await disk.write(2 * CLUSTER + 1024, b"x" * 512)
        if flushed:
            await disk.flush()
        cluster = await disk.read(2 * CLUSTER, CLUSTER)
    assert cluster == bytes(1024) + b"x" * 512 + bytes(CLUSTER - 1536)
    expected = bytearray(BASE)
    expected[2 * CLUSTER : 4 * CLUSTER] = bytes(2 * CLUSTER)
    expected[2 * CLUSTER + 1024 : 2 * CLUSTER + 1536] = b"x" * 512
    expected[3 * CLUSTER : 3 * CLUSTER + 4] = b"data"
    assert guest_bytes(file.content, BASE) == expected


async def test_small_write_into_reused_cluster_shows_nothing_old() -> None:
    """A cluster that is used again is written whole, and shows no old bytes."""
    inner = MemoryFile(build_image(8 * CLUSTER))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.write(0, b"a" * CLUSTER)
        file.fail("write", short=2 * CLUSTER)
        with pytest.raises(Exception, match="write"):
            await disk.write(CLUSTER, b"old" * CLUSTER)
        await disk.write(5 * CLUSTER + 512, b"new")
        cluster = await disk.read(5 * CLUSTER, CLUSTER)
    assert cluster == bytes(512) + b"new" + bytes(CLUSTER - 515)
    assert inspect_image(inner.content).errors == ()


async def test_contiguous_run_is_one_host_write() -> None:
    """A write to many new clusters, and its repetition, are one host write each."""
    file = RecordingFile(build_image(64 * CLUSTER))
    async with opened(file) as disk:
        await disk.write(0, pattern(32 * CLUSTER, 1))
        await disk.flush()
        await disk.write(100, pattern(32 * CLUSTER - 200, 2))
    lengths = [len(change.data) for change in file.changes if isinstance(change, Write)]
    assert lengths.count(32 * CLUSTER) == 1
    assert lengths.count(32 * CLUSTER - 200) == 1


async def test_copy_on_write_takes_the_rest_from_the_chain() -> None:
    """Around a small write a new cluster has the bytes of the base, and zeros past its end."""
    base = pattern(2 * CLUSTER + 700, 3)
    file = MemoryFile(build_image(4 * CLUSTER, backing=b"base"))
    async with opened(file, [base]) as disk:
        await disk.write(CLUSTER - 10, b"y" * 20)
        await disk.write(2 * CLUSTER + 600, b"z" * 50)
        got = await disk.read(0, 4 * CLUSTER)
    expected = bytearray(base.ljust(4 * CLUSTER, b"\0"))
    expected[CLUSTER - 10 : CLUSTER + 10] = b"y" * 20
    expected[2 * CLUSTER + 600 : 2 * CLUSTER + 650] = b"z" * 50
    assert got == expected
    assert guest_bytes(file.content) == expected, "the clusters are whole without the base"


async def test_short_base_in_the_middle_of_a_chain() -> None:
    """Past the end of a layer the disk reads as zeros, not as the layers below."""
    bottom = bytes([7]) * (8 * CLUSTER)
    middle = build_image(3 * CLUSTER + 512, {1: ZERO}, backing=b"bottom")
    file = MemoryFile(build_image(6 * CLUSTER, {0: b"top"}, backing=b"middle"))
    async with opened(file, [middle, bottom]) as disk:
        got = await disk.read(0, 6 * CLUSTER)
        extents = await disk.extents(0, 6 * CLUSTER)
    expected = bytearray(6 * CLUSTER)
    expected[:3] = b"top"
    expected[2 * CLUSTER : 3 * CLUSTER + 512] = bytes([7]) * (CLUSTER + 512)
    assert got == expected
    assert [(extent.kind, extent.length, extent.depth) for extent in extents] == [
        (Kind.DATA, CLUSTER, 0),
        (Kind.ZERO, CLUSTER, 1),
        (Kind.DATA, CLUSTER + 512, 2),
        (Kind.ZERO, 3 * CLUSTER - 512, 1),
    ]


async def test_extents_without_a_base_distinguish_unallocated() -> None:
    """Unallocated and zero extents are distinguished, and equal adjacent ones are joined."""
    file = MemoryFile(build_image(6 * CLUSTER, {1: b"a", 2: b"b", 4: ZERO}), writable=False)
    async with opened(file) as disk:
        extents = await disk.extents(0, 1 << 40)
    assert [(extent.kind, extent.start, extent.length) for extent in extents] == [
        (Kind.UNALLOCATED, 0, CLUSTER),
        (Kind.DATA, CLUSTER, 2 * CLUSTER),
        (Kind.UNALLOCATED, 3 * CLUSTER, CLUSTER),
        (Kind.ZERO, 4 * CLUSTER, CLUSTER),
        (Kind.UNALLOCATED, 5 * CLUSTER, CLUSTER),
    ]


async def test_end_of_the_disk() -> None:
    """Reads and writes are cut at the end of the disk, and a write past it raises NoSpaceError."""
    size = 2 * CLUSTER + 512
    file = MemoryFile(build_image(size))
    async with opened(file) as disk:
        assert await disk.write(size - 100, b"e" * 300) == 100
        assert await disk.read(size - 200, 1000) == bytes(100) + b"e" * 100
        assert await disk.read(size, 10) == b""
        assert await disk.read(1 << 62, 10) == b""
        assert await disk.write(size, b"") == 0
        with pytest.raises(PastEndError, match=f"write at {size}: the disk ends at {size}"):
            await disk.write(size, b"x")
        assert await disk.extents(size, 10) == []


async def test_disk_of_size_zero() -> None:
    """A disk of size 0 opens, reads nothing, refuses writes, and can grow."""
    file = MemoryFile(build_image(0))
    async with opened(file) as disk:
        assert disk.size == 0
        assert await disk.read(0, 100) == b""
        assert await disk.extents(0, 100) == []
        with pytest.raises(NoSpaceError):
            await disk.write(0, b"x")
        await disk.grow(CLUSTER)
        assert await disk.write(10, b"x") == 1
    assert guest_bytes(file.content) == bytes(10) + b"x" + bytes(CLUSTER - 11)


async def test_read_only_disk_is_never_written() -> None:
    """A read-only disk refuses changes, and its file is unchanged."""
    image = build_image(4 * CLUSTER, {0: b"a"}, features=2, autoclear=5, compat=9)
    file = RecordingFile(image, writable=False)
    async with opened(file) as disk:
        assert not disk.writable
        with pytest.raises(ReadOnlyError, match="image: read-only: opened read-only"):
            await disk.write(0, b"x")
        with pytest.raises(ReadOnlyError):
            await disk.grow(8 * CLUSTER)
        await disk.flush()
    assert file.changes == []


async def test_many_writers_into_one_new_cluster() -> None:
    """Concurrent writes into one new cluster all survive, in any order."""
    file = MemoryFile(build_image(4 * CLUSTER, backing=b"base"))
    async with opened(file, [BASE]) as disk, trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(disk.write, CLUSTER + number * 64, bytes([number + 1]) * 60)
    expected = bytearray(BASE[: 4 * CLUSTER])
    for number in range(64):
        expected[CLUSTER + number * 64 : CLUSTER + number * 64 + 60] = bytes([number + 1]) * 60
    assert guest_bytes(file.content, BASE) == expected
    found = inspect_image(file.content)
    assert found.errors == ()
    assert found.leaks == 0


async def test_many_writers_that_need_one_new_table() -> None:
    """Concurrent writes that need the same new L2 table make one."""
    file = MemoryFile(build_image(512 * CLUSTER))
    async with opened(file) as disk, trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(disk.write, number * 9 * CLUSTER, bytes([number + 1]))
    found = inspect_image(file.content)
    assert found.errors == ()
    assert found.leaks == 0
    assert len(file.content) == (2 + 1 + 40) * CLUSTER


@pytest.mark.parametrize("step", range(14))
async def test_cancelled_write_leaves_a_consistent_disk(step: int) -> None:
    """A write cancelled at any step has written each sector completely or not at all."""
    image = build_image(1024 * CLUSTER, {0: b"a" * CLUSTER}, backing=b"base")
    file = MemoryFile(image)
    base = bytes([0xAA]) * (1024 * CLUSTER)
    new = b"n" * (3 * CLUSTER)
    start = 512 * CLUSTER - 512
    async with opened(file, [base]) as disk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.write, start, new)
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        got = bytes(await disk.read(start, len(new)))
        for at in range(0, len(new), 512):
            assert got[at : at + 512] in (new[:512], base[:512])
        await disk.write(start, new)
        assert await disk.read(start, len(new)) == new
    expected = bytearray(base)
    expected[:CLUSTER] = b"a" * CLUSTER
    expected[start : start + len(new)] = new
    assert difference(guest_bytes(file.content, base), expected) is None
    found = inspect_image(file.content)
    assert found.errors == ()
    assert found.leaks <= 1, "at most the cluster that the cancelled write had taken"


async def test_cache_smaller_than_a_slice() -> None:
    """With a cache budget of 0, requests are correct."""
    file = MemoryFile(build_image(2048 * CLUSTER))
    options = replace(WRITABLE, cache_bytes=0)
    expected = bytearray(2048 * CLUSTER)
    async with opened(file, options=options) as disk:
        for batch in range(0, 60, 6):
            async with trio.open_nursery() as nursery:
                for number in range(batch, batch + 6):
                    # Ranges are apart from each other, so the order does not matter.
                    start = number * 34 * CLUSTER + number * 50
                    data = expected[start : start + 3000] = pattern(3000, number)
                    nursery.start_soon(disk.write, start, data)
                    nursery.start_soon(disk.read, start + 40 * CLUSTER, 5000)
        assert difference(await disk.read(0, disk.size), expected) is None
        assert disk.statistics().tables.evictions > 0
        assert disk.statistics().tables.items <= 2
    assert difference(guest_bytes(file.content), expected) is None


async def test_new_table_where_old_bytes_are() -> None:
    """A new table over old bytes is zeroed first."""
    size = 1024 * CLUSTER
    inner = MemoryFile(build_image(size))
    file = FailingFile(inner)
    async with opened(file) as disk:
        await disk.write(0, b"a" * CLUSTER)
        file.fail("write", short=2 * CLUSTER)
        with pytest.raises(HostError):
            await disk.write(CLUSTER, b"\0\x10\0\0\0\0\0\0" * 1024)
        await disk.write(600 * CLUSTER, b"b" * CLUSTER)
        expected = bytearray(b"a" * CLUSTER).ljust(size, b"\0")
        expected[600 * CLUSTER : 601 * CLUSTER] = b"b" * CLUSTER
        assert difference(await disk.read(0, size), expected) is None
    assert difference(guest_bytes(inner.content), expected) is None
    assert inspect_image(inner.content).leaks == 0


async def test_base_is_not_copied_past_the_end_of_the_disk() -> None:
    """The last cluster has zeros past the end of the disk."""
    size = 2 * CLUSTER + 512
    file = MemoryFile(build_image(size, backing=b"base"))
    async with opened(file, [BASE]) as disk:
        await disk.write(2 * CLUSTER + 100, b"x")
    last = get_entry(file.content, l2_entry_offset(file.content, 2))
    expected = bytearray(BASE[:512].ljust(CLUSTER, b"\0"))
    expected[100:101] = b"x"
    assert file.content[last : last + CLUSTER] == expected


async def test_what_no_layer_has_is_zero_with_a_base() -> None:
    """Over a base, a range that no layer has is reported as zeros."""
    bottom = build_image(4 * CLUSTER, {1: b"bottom"})
    file = MemoryFile(build_image(4 * CLUSTER, backing=b"bottom"), writable=False)
    async with opened(file, [bottom]) as disk:
        kinds = [(extent.kind, extent.length) for extent in await disk.extents(0, disk.size)]
    assert kinds == [
        (Kind.ZERO, CLUSTER),
        (Kind.DATA, CLUSTER),
        (Kind.ZERO, 2 * CLUSTER),
    ]
