"""The fast path of a request: what it takes, and what it leaves to the slow path."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

from qedfuse.disk.options import OpenOptions
from tests.support.disks import (
    WRITABLE,
    build_image,
    difference,
    get_entry,
    guest_bytes,
    header_of,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.hostfiles import FailingFile, MemoryFile

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk

CLUSTER: Final = 4096
SLICE: Final = 512 * CLUSTER
SIZE: Final = 2 * SLICE


def in_page_cache(content: bytes | bytearray) -> MemoryFile:
    """Return a file whose bytes are all in memory."""
    file = MemoryFile(content)
    file.in_page_cache = True
    return file


async def touch(disk: Disk) -> None:
    """Load all tables into the cache."""
    for start in range(0, disk.size, SLICE):
        await disk.read(start, 1)


async def test_neighbours_in_the_file_are_one_request() -> None:
    """Contiguous clusters are one host read, and the parts of other reads are joined."""
    order = [0, 1, 2, 9, 8, 7, 20]
    file = in_page_cache(build_image(SIZE, {at: pattern(CLUSTER, at) for at in order}))
    expected = guest_bytes(file.content)
    async with opened(file) as disk:
        assert disk.try_read(100, 50) is None, "no table is in memory yet"
        await touch(disk)
        for start, length in ((100, 50), (5, 3 * CLUSTER - 5), (6 * CLUSTER + 1, 16 * CLUSTER)):
            got = disk.try_read(start, length)
            assert got is not None
            assert difference(bytes(got), expected[start:][:length]) is None
        assert disk.try_read(SIZE - 10, 11) is None, "past the end"
        assert disk.try_read(0, 2 << 20) is None, "too long"


async def test_the_end_of_a_slice() -> None:
    """A request across two slices is left to the slow path, even for one run in the file."""
    clusters = {at: pattern(CLUSTER, at) for at in (510, 511, 512, 513)}
    file = in_page_cache(build_image(SIZE, clusters))
    async with opened(file) as disk:
        await touch(disk)
        for count in (2, 3):
            assert disk.try_read(510 * CLUSTER, count * CLUSTER) is None or count == 2
            assert disk.try_write(510 * CLUSTER, b"x" * count * CLUSTER) is (count == 2)
        got = disk.try_read(511 * CLUSTER + 5, CLUSTER - 5)
        assert got is not None
        assert bytes(got) == b"x" * (CLUSTER - 5)


async def test_bad_entries_are_left_to_the_slow_path() -> None:
    """A slice with a bad entry is left to the slow path, which reports it."""
    image = build_image(SIZE, {at: pattern(CLUSTER, at) for at in range(4)})
    put_entry(image, l2_entry_offset(image, 1), get_entry(image, l2_entry_offset(image, 0)) + 7)
    file = in_page_cache(image)
    async with opened(file, options=OpenOptions()) as disk:
        await disk.read(0, CLUSTER)
        assert disk.try_read(0, CLUSTER) is None
        assert disk.try_read(CLUSTER, CLUSTER) is None


async def test_writes_in_place_are_made_durable_by_the_next_flush() -> None:
    """A write by the fast path is made durable by the next flush."""
    file = FailingFile(in_page_cache(build_image(SIZE, {0: pattern(CLUSTER, 0)})))
    file.try_write = file.inner.try_write  # type: ignore[assignment, method-assign]
    async with opened(file) as disk:
        await touch(disk)
        before = file.calls["datasync"]
        assert disk.try_write(100, b"new")
        await disk.flush()
        assert file.calls["datasync"] == before + 1
        assert (await disk.read(98, 7))[2:5] == b"new"


async def test_writes_that_are_left_to_the_slow_path() -> None:
    """Writes to new or zero clusters, or to the end of the disk, are left to the slow path."""
    clusters: dict[int, bytes | int] = {0: b"a", 1: 1, 5: b"b", 4: b"c", SIZE // CLUSTER - 1: b"d"}
    image = build_image(SIZE, clusters)
    for options in (WRITABLE, replace(WRITABLE, detect_zeroes="on"), OpenOptions()):
        file = in_page_cache(image)
        file.writable = options.writable
        async with opened(file, options=options) as disk:
            await touch(disk)
            content = bytes(file.content)
            for start, length in (
                (2 * CLUSTER, 5), (CLUSTER, 5), (SIZE - 5, 6), (SIZE, 1), (0, 0),
            ):  # fmt: skip
                assert not disk.try_write(start, b"x" * length)
            assert file.content == content
            assert disk.try_write(0, b"x") is (options is WRITABLE)


async def test_not_before_the_first_change_is_announced() -> None:
    """The first write is left to the slow path if autoclear bits must be cleared."""
    file = in_page_cache(build_image(SIZE, {0: b"a"}, autoclear=0x30))
    async with opened(file) as disk:
        await touch(disk)
        assert not disk.try_write(0, b"x")
        await disk.write(0, b"x")
        assert disk.try_write(1, b"y")
        assert (await disk.read(0, 2)) == b"xy"


async def test_tables_that_were_moved_are_found_at_their_new_place() -> None:
    """After a compaction the fast path reads tables at their new offsets."""
    file = in_page_cache(
        build_image(64 * SLICE, {512 * at: pattern(CLUSTER, at) for at in range(40)})
    )
    l1 = slice(header_of(file.content).l1_table_offset, header_of(file.content).l1_end)
    tables = file.content[l1]
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await touch(disk)
        assert all(disk.try_read(at * SLICE, 1) is not None for at in range(40))
        await disk.discard(0, 10 * SLICE)
        await disk.flush()
        await disk.compact()
        assert file.content[l1] != tables, "no table was moved"
        for at in range(10, 40):
            assert disk.try_write(at * SLICE, b"x")
            got = disk.try_read(at * SLICE + 1, 99)
            assert got is not None
            assert bytes(got) == pattern(CLUSTER, at)[1:100]
            assert (await disk.read(at * SLICE, 1)) == b"x"


def is_one_range(disk: Disk, start: int, length: int) -> bool:
    """Return whether a range is known to be one range of a file."""
    with patch.object(MemoryFile, "fileno", return_value=3):  # otherwise no range is
        return disk.try_locate(start, length) is not None


async def test_contiguous_clusters_of_a_base() -> None:
    """Contiguous clusters of one base are one range of its file, up to an allocated cluster."""
    base = random.Random(3).randbytes(64 * CLUSTER)
    file = in_page_cache(build_image(SIZE, {20: pattern(CLUSTER, 20)}))
    async with opened(file, [base]) as disk:
        await touch(disk)
        expected = bytearray(base.ljust(SIZE, b"\0"))
        expected[20 * CLUSTER : 21 * CLUSTER] = pattern(CLUSTER, 20)
        for start, length, is_range in (
            (0, 20 * CLUSTER, True),
            (21 * CLUSTER + 7, 16 * CLUSTER, True),
            (19 * CLUSTER, 2 * CLUSTER, False),  # the second cluster is in the image
            (20 * CLUSTER, 2 * CLUSTER, False),  # the second cluster is in the base
            (63 * CLUSTER, 2 * CLUSTER, False),  # the base ends between them
        ):
            assert is_one_range(disk, start, length) == is_range
            got = bytes(await disk.read(start, length))
            assert difference(got, bytes(expected[start : start + length])) is None


async def test_clusters_of_a_base_in_another_order() -> None:
    """Clusters of a base that are not contiguous in its file are no range of it."""
    base = build_image(SIZE, {at: pattern(CLUSTER, at) for at in (3, 2, 5)})
    file = in_page_cache(build_image(SIZE, {}))
    async with opened(file, [base]) as disk:
        await touch(disk)
        assert is_one_range(disk, 2 * CLUSTER, CLUSTER)
        assert not is_one_range(disk, 2 * CLUSTER, 2 * CLUSTER)
        assert not is_one_range(disk, 5 * CLUSTER, 2 * CLUSTER), "zeros follow"
