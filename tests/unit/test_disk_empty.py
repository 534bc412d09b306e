"""Emptying an image that equals its base, and hiding the base by zero clusters."""

from __future__ import annotations

import random

import pytest

from qedfuse.errors import CorruptImageError, ReadOnlyError
from qedfuse.ondisk.constants import ZERO
from tests.support.disks import (
    build_image,
    difference,
    get_entry,
    guest_bytes,
    header_of,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
)
from tests.support.hostfiles import MemoryFile, RecordingFile

CLUSTER = 4096
SPAN = 512 * CLUSTER
SIZE = 2 * SPAN + 9 * CLUSTER + 512
BASE = pattern(SIZE, 4)


def same_as_base(chance: random.Random) -> bytearray:
    """Return an overlay that holds nothing that differs from its base."""
    clusters: dict[int, bytes | int] = {}
    for number in chance.sample(range(-(-SIZE // CLUSTER)), 60):
        clusters[number] = BASE[number * CLUSTER :][:CLUSTER]
    return build_image(SIZE, clusters, backing=b"base")


@pytest.mark.parametrize("seed", range(4))
async def test_every_crash_state_of_emptying_reads_the_same(seed: int) -> None:
    """At each step of emptying, power failures included, the disk reads the same."""
    chance = random.Random(seed)
    file = RecordingFile(same_as_base(chance))
    async with opened(file) as disk:
        await disk.empty()
    assert len(file.content) == header_of(file.content).l1_end
    assert not any(file.content[CLUSTER:])
    for count, content in file.prefixes():
        assert inspect_image(content).errors == (), count
        assert difference(guest_bytes(content, BASE), BASE) is None, count
        lost = file.power_loss(count, chance)
        assert inspect_image(lost).errors == (), count
        assert difference(guest_bytes(lost, BASE), BASE) is None, count


async def test_zero_clusters_go_as_well() -> None:
    """Emptying removes zero clusters too, and the disk stays usable."""
    image = build_image(SIZE, {0: ZERO, 3: b"x", 513: ZERO}, backing=b"base")
    file = MemoryFile(image)
    async with opened(file, [BASE]) as disk:
        await disk.empty()
        assert difference(await disk.read(0, SIZE), BASE) is None
        await disk.write(CLUSTER, b"new")
    expected = BASE[:CLUSTER] + b"new" + BASE[CLUSTER + 3 :]
    assert difference(guest_bytes(file.content, BASE), expected) is None
    assert inspect_image(file.content).leaks == 0
    assert len(file.content) == header_of(file.content).l1_end + 2 * CLUSTER


async def test_entries_past_the_end_stay() -> None:
    """Emptying keeps entries past the end of the disk, which a resize may use."""
    image = build_image(SPAN + 2 * CLUSTER, {1: b"x", 513: b"y", 700: b"past"})
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.empty()
    assert get_entry(file.content, l2_entry_offset(file.content, 700)) > ZERO
    assert get_entry(file.content, l2_entry_offset(file.content, 513)) == 0
    assert get_entry(file.content, header_of(file.content).l1_table_offset) == 0


@pytest.mark.expect_log("found invalid table entries")
async def test_what_cannot_be_emptied() -> None:
    """A bad entry and a read-only disk refuse to be emptied."""
    image = build_image(SIZE, {0: 3 * CLUSTER + 1})
    async with opened(MemoryFile(image)) as disk:
        with pytest.raises(CorruptImageError, match="unaligned"):
            await disk.empty()
    file = MemoryFile(image, writable=False)
    async with opened(file) as disk:
        with pytest.raises(ReadOnlyError):
            await disk.empty()
        with pytest.raises(ReadOnlyError):
            await disk.write_zero_clusters(0, CLUSTER)
        with pytest.raises(ReadOnlyError):
            await disk.set_backing(b"base", backing_is_raw=True)
    assert file.content == image


async def test_hiding_more_than_the_base_shows() -> None:
    """Clusters become zero clusters also past the end of the base."""
    file = MemoryFile(build_image(SIZE, {2: b"data"}))
    async with opened(file) as disk:
        await disk.write_zero_clusters(0, 4 * CLUSTER)
        await disk.write_zero_clusters(2 * SPAN + 9 * CLUSTER, CLUSTER)
    data = b"data".ljust(CLUSTER, b"\0")
    expected = bytes(2 * CLUSTER) + data + bytes(CLUSTER) + BASE[4 * CLUSTER : -512] + bytes(512)
    assert difference(guest_bytes(file.content, BASE), expected) is None
