"""Seeking data and holes agrees with the extents of the chain."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.extents import Kind
from qedfuse.ondisk.constants import ZERO
from tests.support.disks import (
    build_image,
    get_entry,
    header_of,
    l2_entry_offset,
    opened,
    put_entry,
)
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent

CLUSTER: Final = 4096
TABLE: Final = CLUSTER // 8
"""Entries of a table, and so clusters that one covers."""


async def data_of(disk: Disk) -> list[tuple[int, int]]:
    """Return the ranges of data by the extents."""
    result: list[tuple[int, int]] = []
    for extent in await disk.extents(0, disk.size):
        if extent.kind in {Kind.DATA, Kind.BAD}:
            if result and result[-1][1] == extent.start:
                result[-1] = (result[-1][0], extent.end)
            else:
                result.append((extent.start, extent.end))
    return result


async def found_in(disk: Disk) -> list[tuple[int, int]]:
    """Return the same by seeking from one to the next, as cp does."""
    result = []
    at = 0
    while at < disk.size:
        start = await disk.next_data(at)
        if start is None:
            break
        at = await disk.next_hole(start)
        result.append((start, at))
    return result


def clusters(chance: random.Random, tables: int) -> dict[int, bytes | int]:
    """Draw data clusters, zero clusters and many unallocated ones."""
    result: dict[int, bytes | int] = {}
    for table in chance.sample(range(tables), tables // 2):
        at = table * TABLE
        while at < (table + 1) * TABLE:
            count = chance.choice((1, 2, 50, 300))
            kind = chance.choice((None, None, ZERO, b"d"))
            if kind is not None:
                result |= dict.fromkeys(range(at, min(at + count, (table + 1) * TABLE)), kind)
            at += count
    return result


@pytest.mark.parametrize("seed", range(6))
async def test_seeking_agrees_with_the_extents(seed: int) -> None:
    """For random chains, seeking finds the same ranges of data as the extents."""
    chance = random.Random(seed)
    sizes = [chance.randrange(3, 9) * TABLE * CLUSTER - 512 * chance.randrange(8) for _ in range(3)]
    images = [
        build_image(size, clusters(chance, size // CLUSTER // TABLE), backing=b"b" * (depth < 2))
        for depth, size in enumerate(sizes)
    ]
    async with opened(MemoryFile(images[0]), images[1:]) as disk:
        expected = await data_of(disk)
        assert await found_in(disk) == expected
        for _ in range(200):
            at = chance.randrange(disk.size)
            inside = next(((start, end) for start, end in expected if end > at), None)
            first = None if inside is None else max(at, inside[0])
            assert await disk.next_data(at) == first
            hole = at if first != at or inside is None else inside[1]
            assert await disk.next_hole(at) == hole


@pytest.mark.expect_log("the image must be repaired")
async def test_what_cannot_be_read_is_data() -> None:
    """A bad entry counts as data, so that a copy meets its error."""
    image = build_image(3 * TABLE * CLUSTER, {0: b"a", 5: 777, 2 * TABLE: b"c"})
    put_entry(image, header_of(image).l1_table_offset + 8, 999)
    async with opened(MemoryFile(image)) as disk:
        assert await found_in(disk) == [
            (0, CLUSTER),
            (5 * CLUSTER, 6 * CLUSTER),
            (TABLE * CLUSTER, (2 * TABLE + 1) * CLUSTER),
        ]


async def test_the_end_of_the_disk() -> None:
    """The end of the disk is a hole, and past it there is nothing."""
    image = build_image(CLUSTER + 512, {1: b"x"})
    async with opened(MemoryFile(image)) as disk:
        assert await disk.next_hole(CLUSTER + 100) == CLUSTER + 512
        assert await disk.next_data(CLUSTER + 512) is None


async def test_scattered_clusters_are_searched_in_small_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search through scattered clusters looks at a bounded number of entries per step."""
    length = 3 * TABLE
    image = build_image(length * CLUSTER, dict.fromkeys(range(0, length, 2), b"d"))
    offsets = [l2_entry_offset(image, number) for number in range(0, length, 2)]
    values = [get_entry(image, offset) for offset in offsets]
    random.Random(2).shuffle(values)
    for offset, value in zip(offsets, values, strict=True):
        put_entry(image, offset, value)
    looks: list[int] = []
    original = Chain.extents

    async def counting(self: Chain, start: int, length: int, depth: int = 0) -> list[Extent]:
        result = await original(self, start, length, depth)
        looks.append(len(result))
        return result

    monkeypatch.setattr(Chain, "extents", counting)
    async with opened(MemoryFile(image)) as disk:
        assert len(await found_in(disk)) == length // 2
        assert max(looks) <= TABLE
        assert len(looks) > length // 2, "many steps"
