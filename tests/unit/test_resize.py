"""Growing a disk: added bytes read as zeros, whatever the file or the base has there."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.errors import CorruptImageError, HostError, UsageError
from qedfuse.ondisk.constants import ZERO
from qedfuse.ondisk.geometry import Geometry
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
    put_entry,
)
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile

if TYPE_CHECKING:
    from tests.support.hostfiles import Action

CLUSTER = 4096
SPAN = 512 * CLUSTER


@pytest.mark.parametrize("old", [0, 512, CLUSTER, CLUSTER + 512, 3 * CLUSTER])
@pytest.mark.parametrize("new", [3 * CLUSTER + 512, 5 * CLUSTER, SPAN + CLUSTER + 512])
@pytest.mark.parametrize("base_size", [0, CLUSTER + 100, 4 * CLUSTER, SPAN + 3 * CLUSTER])
async def test_overlay_shorter_than_its_base(old: int, new: int, base_size: int) -> None:
    """Bytes past the old end never show the base, also after a reopen."""
    base = pattern(base_size, 2)
    file = MemoryFile(build_image(old, backing=b"base"))
    expected = base[:old].ljust(new, b"\0")
    async with opened(file, [base]) as disk:
        await disk.grow(new)
        assert disk.size == new
        assert difference(await disk.read(0, 2 * new), expected) is None
    assert header_of(file.content).image_size == new
    assert not header_of(file.content).need_check
    assert difference(guest_bytes(file.content, base), expected) is None
    assert inspect_image(file.content).errors == ()
    assert inspect_image(file.content).leaks == 0
    async with opened(MemoryFile(file.content, writable=False), [base]) as disk:
        assert difference(await disk.read(0, new), expected) is None


@pytest.mark.parametrize("entry", ["data", "zero", "none"])
@pytest.mark.parametrize("based", [False, True])
async def test_bytes_behind_the_end_in_the_last_cluster(entry: str, *, based: bool) -> None:
    """Foreign bytes in the last cluster past the end of the disk become zeros."""
    base = b"B" * (4 * CLUSTER)
    old = 2 * CLUSTER + 1024
    clusters: dict[int, bytes | int] = {0: b"first"}
    if entry == "data":
        clusters[2] = b"D" * CLUSTER
    elif entry == "zero":
        clusters[2] = ZERO
    file = MemoryFile(build_image(old, clusters, backing=b"base" if based else b""))
    bases = [base] if based else []
    async with opened(file, bases) as disk:
        before = await disk.read(0, old)
        await disk.grow(3 * CLUSTER + 512)
        await disk.grow(4 * CLUSTER)
        after = await disk.read(0, 4 * CLUSTER)
    assert after == bytes(before).ljust(4 * CLUSTER, b"\0")
    assert guest_bytes(file.content, bytes(base) if based else b"") == after
    assert not guest_bytes(file.content, b"" if not based else base)[old:].strip(b"\0")


async def test_writes_while_growing() -> None:
    """Writes to the last cluster and elsewhere succeed while the disk grows."""
    old, new = 2 * CLUSTER + 1024, SPAN + 4 * CLUSTER
    base = b"B" * (2 * SPAN)
    file = MemoryFile(build_image(old, backing=b"base"))
    async with opened(file, [base]) as disk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.write, old - 100, b"w" * 100)
            nursery.start_soon(disk.grow, new)
            nursery.start_soon(disk.write, 0, b"w" * 100)
            nursery.start_soon(disk.grow, new)
        await disk.write(new - 10, b"end")
    expected = bytearray(base[:old].ljust(new, b"\0"))
    expected[old - 100 : old] = expected[:100] = b"w" * 100
    expected[new - 10 : new - 7] = b"end"
    assert difference(guest_bytes(file.content, base), expected) is None


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (CLUSTER, "found 4096, expected at least 8192, the present size"),
        (8193, "found 8193, expected a multiple of 512 up to 1073741824"),
        ((1 << 30) + 512, "expected a multiple of 512 up to 1073741824"),
    ],
)
async def test_sizes_that_are_refused(size: int, words: str) -> None:
    """A smaller size, an odd size and a size beyond the tables are refused without a change."""
    file = RecordingFile(build_image(2 * CLUSTER))
    async with opened(file) as disk:
        with pytest.raises(UsageError, match=words):
            await disk.grow(size)
        await disk.grow(2 * CLUSTER)
    assert file.changes == []


@pytest.mark.parametrize(("cluster_size", "table_size"), [(4096, 1), (4096, 16), (65536, 1)])
async def test_largest_size(cluster_size: int, table_size: int) -> None:
    """A disk grows to all that its tables can address, and can be written at its end."""
    most = Geometry(cluster_size, table_size).max_image_size
    file = MemoryFile(build_image(512, cluster_size=cluster_size, table_size=table_size))
    async with opened(file) as disk:
        await disk.grow(most)
        assert await disk.write(most - 5, b"at the end") == 5
        assert await disk.read(most - 10, 100) == bytes(5) + b"at th"
    assert inspect_image(file.content).errors == ()
    assert header_of(file.content).image_size == most


async def test_data_past_the_end_refuses_to_grow() -> None:
    """A disk with table entries past its end is not grown."""
    for number in (3, 600):
        image = build_image(CLUSTER, {0: b"a", number: b"old"})
        file = RecordingFile(image)
        async with opened(file) as disk:
            with pytest.raises(
                CorruptImageError, match=rf"in use for guest offset {number * 4096},"
            ):
                await disk.grow(2 * SPAN)
            assert disk.size == CLUSTER
            await disk.write(0, b"b")
    image = build_image(CLUSTER, {0: b"a"})
    put_entry(image, l2_entry_offset(image, 5), 1 << 50)
    async with opened(MemoryFile(image)) as disk:
        with pytest.raises(CorruptImageError, match="repaired"):
            await disk.grow(SPAN)


@pytest.mark.parametrize(("action", "calls"), [("write", 6), ("truncate", 1), ("read", 3)])
async def test_failed_growing_can_be_tried_again(action: Action, calls: int) -> None:
    """A resize that fails at any host call keeps the content, and a second try succeeds."""
    base = b"B" * (2 * SPAN)
    old, new = CLUSTER + 512, SPAN + CLUSTER
    for nth in itertools.count(1):
        inner = MemoryFile(build_image(old, backing=b"base"))
        file = FailingFile(inner)
        async with opened(file, [base]) as disk:
            file.fail(action, nth, may_miss=True)
            try:
                await disk.grow(new)
            except HostError:
                assert await disk.read(0, old) == base[:old]
            file.heal()
            await disk.grow(new)
            assert difference(await disk.read(0, new), base[:old].ljust(new, b"\0")) is None
        assert difference(guest_bytes(inner.content, base), base[:old].ljust(new, b"\0")) is None
        assert inspect_image(inner.content).errors == ()
        if not file.struck[action]:
            break
    assert nth == calls + 1, "each of the calls failed once"


async def test_new_size_is_durable_last() -> None:
    """A crash during a resize leaves the old disk, or the new one with zeros."""
    base = b"B" * (4 * CLUSTER)
    file = RecordingFile(build_image(CLUSTER, backing=b"base"))
    async with opened(file, [base]) as disk:
        await disk.grow(3 * CLUSTER)
    sizes = set()
    for _, content in file.prefixes():
        size = header_of(content).image_size
        sizes.add(size)
        assert guest_bytes(content, base) == base[:CLUSTER].ljust(size, b"\0")
    assert sizes == {CLUSTER, 3 * CLUSTER}


async def test_tables_past_the_end_of_a_shorter_disk_stay_in_use() -> None:
    """A crash before the new size leaves tables that the next resize uses."""
    base = b"B" * (2 * SPAN)
    image = build_image(CLUSTER, {0: b"a", 512: ZERO}, backing=b"base")
    file = MemoryFile(image)
    async with opened(file, [base]) as disk:
        await disk.grow(2 * SPAN)
        assert difference(await disk.read(0, 2 * SPAN), b"a".ljust(2 * SPAN, b"\0")) is None
    header = header_of(file.content)
    place = header.l1_table_offset + 8
    assert get_entry(file.content, place) == get_entry(image, place)
    assert inspect_image(file.content).errors == ()


async def test_the_refusal_to_shrink_has_the_offset_of_the_data() -> None:
    """A disk that would lose data is not shrunk, and the message has the data's first byte."""
    content = bytes(3000) + b"data" + bytes(CLUSTER - 3004)
    file = MemoryFile(build_image(4 * CLUSTER, {1: content}))
    async with opened(file) as disk:
        for size, expected in ((CLUSTER + 512, CLUSTER + 3000), (CLUSTER, CLUSTER)):
            with pytest.raises(UsageError, match=f"found data at {expected}, past .* {size},"):
                await disk.shrink(size)
        await disk.shrink(CLUSTER + 3072)
