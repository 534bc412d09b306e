"""Table entries that point to where they must not, and image files of odd length."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError, ImageError, NeedsCheckError
from tests.support.disks import (
    WRITABLE,
    build_image,
    get_entry,
    guest_bytes,
    header_of,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.hostfiles import MemoryFile, RecordingFile, Write

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

CLUSTER = 4096
SPAN = 512 * CLUSTER  # guest bytes of one table of one cluster
SCANNED = pytest.mark.expect_log("found invalid table entries")
"""The scan of a writable image meets the bad entry too; a request that fails logs nothing."""


def image_with_data(count: int = 6) -> bytearray:
    """Make an image whose first guest clusters hold their number plus one."""
    clusters = {number: bytes([number + 1]) * CLUSTER for number in range(count)}
    return build_image(2 * SPAN, clusters)


def places(image: bytearray) -> dict[str, int]:
    """Name the file offsets that a data cluster may not have, and some it may not either."""
    header = header_of(image)
    return {
        "L1 table": header.l1_table_offset,
        "L2 table": get_entry(image, header.l1_table_offset),
        "unaligned": get_entry(image, l2_entry_offset(image, 1)) + 512,
        "reserved": 2,
        "end": len(image),
        "far": 1 << 62,
        "top": (1 << 64) - CLUSTER,
    }


@pytest.mark.parametrize("writable", [pytest.param(True, marks=SCANNED), False])
@pytest.mark.parametrize("place", list(places(image_with_data())))
async def test_bad_l2_entry_costs_its_own_range_only(place: str, *, writable: bool) -> None:
    """A bad L2 entry fails requests for its cluster with a reason, and no others."""
    image = image_with_data()
    put_entry(image, l2_entry_offset(image, 2), places(image)[place])
    file = RecordingFile(image, writable=writable)
    async with opened(file) as disk:
        if writable:
            await disk.ensure_scanned()
        with pytest.raises(CorruptImageError, match=r"image: L1 entry 0: L2 entry 2: found \d+ \("):
            await disk.read(0, 6 * CLUSTER)
        with pytest.raises(CorruptImageError):
            await disk.read(3 * CLUSTER - 1, 1)
        assert await disk.read(0, 2 * CLUSTER) == b"\1" * CLUSTER + b"\2" * CLUSTER
        assert await disk.read(3 * CLUSTER, CLUSTER) == b"\4" * CLUSTER
        bad = [extent for extent in await disk.extents(0, 6 * CLUSTER) if extent.kind is Kind.BAD]
        assert [(extent.start, extent.length) for extent in bad] == [(2 * CLUSTER, CLUSTER)]
        if writable:
            with pytest.raises(CorruptImageError):
                await disk.write(2 * CLUSTER + 100, b"x" * 100)
            assert file.changes == []
            await disk.write(3 * CLUSTER, b"ok")
            assert await disk.read(3 * CLUSTER, 3) == b"ok\4"


@SCANNED
async def test_data_over_a_long_header() -> None:
    """No entry may point into any cluster of a long header."""
    image = build_image(SPAN, {0: b"a", 1: b"b"}, header_size=3)
    put_entry(image, l2_entry_offset(image, 1), 2 * CLUSTER)
    file = RecordingFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        with pytest.raises(CorruptImageError, match="over the header or a table"):
            await disk.write(CLUSTER, b"x")
    assert file.changes == []


@pytest.mark.parametrize("value", [1, 512, CLUSTER, 1 << 40, (1 << 64) - CLUSTER])
@SCANNED
async def test_bad_l1_entry_costs_its_own_range_only(value: int) -> None:
    """A bad L1 entry fails requests for its range, and no others."""
    image = image_with_data()
    header = header_of(image)
    put_entry(image, header.l1_table_offset + 8, value)
    file = RecordingFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        for start, length in ((SPAN, 1), (SPAN - 1, 2), (2 * SPAN - 1, 1)):
            with pytest.raises(CorruptImageError, match=f"image: L1 entry 1: found {value}"):
                await disk.read(start, length)
        with pytest.raises(CorruptImageError):
            await disk.write(SPAN + 5, b"x")
        assert file.changes == []
        await disk.write(SPAN - 1, b"x")
        assert await disk.read(SPAN - 2, 2) == b"\0x"


@SCANNED
async def test_table_that_the_file_cuts_short() -> None:
    """An L1 entry whose table is not completely inside the file is bad."""
    image = build_image(2 * 2048 * CLUSTER, {0: b"a"}, table_size=4)
    header = header_of(image)
    put_entry(image, header.l1_table_offset + 8, len(image) - 2 * CLUSTER)
    async with opened(MemoryFile(image)) as disk:
        await disk.ensure_scanned()
        with pytest.raises(CorruptImageError, match="cut short"):
            await disk.read(2048 * CLUSTER, 1)


@pytest.mark.parametrize("writable", [pytest.param(True, marks=SCANNED), False])
async def test_each_cluster_of_a_run_is_validated(*, writable: bool) -> None:
    """Of a run across the end of the file only the clusters past the end are bad."""
    image = image_with_data()[: -2 * CLUSTER]
    async with opened(MemoryFile(image, writable=writable)) as disk:
        if writable:
            await disk.ensure_scanned()
        with pytest.raises(CorruptImageError):
            await disk.read(0, 6 * CLUSTER)
        assert await disk.read(3 * CLUSTER, CLUSTER) == b"\4" * CLUSTER
        for number in (4, 5):
            with pytest.raises(CorruptImageError):
                await disk.read(number * CLUSTER, 1)
        kinds = [extent.kind for extent in await disk.extents(0, 6 * CLUSTER)]
        assert kinds[0] is Kind.DATA
        assert set(kinds[1:]) == {Kind.BAD}


async def test_cluster_cut_short_reads_as_far_as_it_goes() -> None:
    """A read-only disk returns the bytes that the file has of its last cluster."""
    image = image_with_data()[:-100]
    async with opened(MemoryFile(image, writable=False)) as disk:
        assert await disk.read(5 * CLUSTER, CLUSTER - 100) == b"\6" * (CLUSTER - 100)
        with pytest.raises(CorruptImageError, match="the file ends at"):
            await disk.read(5 * CLUSTER, CLUSTER - 99)


@SCANNED
async def test_wild_entry_stays_bad_when_the_file_has_grown_over_it() -> None:
    """An entry past the end of the file stays bad when the file grows over its offset."""
    image = build_image(2 * SPAN, {0: b"a", 512: b"b"})
    victim = len(image) + 3 * CLUSTER
    put_entry(image, l2_entry_offset(image, 7), victim)
    file = MemoryFile(image)
    async with opened(file, options=replace(WRITABLE, cache_bytes=0)) as disk:
        await disk.ensure_scanned()
        for number in range(16, 48):
            await disk.write(number * CLUSTER, bytes([number]) * CLUSTER)
            await disk.flush()
            # The other table's slice drives this one out of memory.
            await disk.read(SPAN, 1)
        assert disk.statistics().file_bytes > victim + CLUSTER
        assert disk.statistics().tables.evictions > 30
        with pytest.raises(CorruptImageError, match="outside the file"):
            await disk.read(7 * CLUSTER, 1)
        with pytest.raises(CorruptImageError):
            await disk.write(7 * CLUSTER, b"x")
        assert await disk.read(16 * CLUSTER, CLUSTER) == b"\x10" * CLUSTER


@SCANNED
async def test_wild_l1_entry_stays_bad_when_the_file_has_grown_over_it() -> None:
    """An L1 entry past the end of the file stays bad when data is written there."""
    image = build_image(3 * SPAN, {0: b"a"})
    header = header_of(image)
    put_entry(image, header.l1_table_offset + 16, len(image) + 2 * CLUSTER)
    file = MemoryFile(image)
    async with opened(file, options=replace(WRITABLE, cache_bytes=0)) as disk:
        await disk.ensure_scanned()
        for number in range(512, 530):
            await disk.write(number * CLUSTER, b"\x00\x10\0\0\0\0\0\0" * 512)
            await disk.flush()
            await disk.read(0, 1)
        with pytest.raises(CorruptImageError, match="L1 entry 2"):
            await disk.read(2 * SPAN, 1)


async def test_overlapping_tables_refuse_a_writer() -> None:
    """An image with overlapping L2 tables opens for reading only."""
    image = build_image(3 * 2048 * CLUSTER, {0: b"a", 2048: b"b"}, table_size=4)
    header = header_of(image)
    table = get_entry(image, header.l1_table_offset)
    for value in (table, table + CLUSTER):
        put_entry(image, header.l1_table_offset + 16, value)
        with pytest.raises(CorruptImageError, match=f"found L2 tables at {table} and {value}"):
            async with opened(MemoryFile(image)):
                pass
        async with opened(MemoryFile(image, writable=False)) as disk:
            assert await disk.read(CLUSTER, 1) == b"\0"


async def test_refused_image_is_unchanged() -> None:
    """An image that is refused for writing keeps NEED_CHECK and every other byte."""
    image = build_image(3 * SPAN, {0: b"a", 512: b"b"}, features=2, autoclear=1)
    header = header_of(image)
    table = get_entry(image, header.l1_table_offset)
    put_entry(image, header.l1_table_offset + 16, table)
    file = RecordingFile(image)
    with pytest.raises(CorruptImageError):
        async with opened(file):
            pass
    assert file.changes == []
    assert file.closed


@SCANNED
async def test_table_past_the_end_of_the_disk_is_protected_too() -> None:
    """A resize does not bring a table into use that a guest could write to."""
    image = build_image(SPAN, {0: bytes(CLUSTER)})
    header = header_of(image)
    data = get_entry(image, l2_entry_offset(image, 0))
    put_entry(image, header.l1_table_offset + 8, data)
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        with pytest.raises(CorruptImageError):
            await disk.write(0, (512).to_bytes(8, "little"))
        await disk.grow(2 * SPAN)
        assert await disk.read(SPAN, CLUSTER) == bytes(CLUSTER)


async def test_junk_in_an_odd_tail_does_not_show_up() -> None:
    """Bytes past the last whole cluster do not show in a cluster that is allocated there."""
    image = build_image(4 * CLUSTER, {0: b"a"}) + b"junk" * 700
    file = RecordingFile(image)
    async with opened(file) as disk:
        await disk.write(CLUSTER + 100, b"x")
        assert await disk.read(CLUSTER, CLUSTER) == bytes(100) + b"x" + bytes(CLUSTER - 101)
    assert guest_bytes(file.content)[:2] == b"a\0"
    assert inspect_image(file.content).errors == ()
    assert len(file.content) % CLUSTER == 0


async def test_odd_tail_and_need_check_call_the_inspector(tmp_path: Path) -> None:
    """An odd tail or NEED_CHECK needs an inspector for writing, and is refused without one."""
    path = tmp_path / "odd.qed"
    asked: list[int] = []

    async def inspector(file: HostFile, header: Header) -> None:
        asked.append(header.features)
        if b"refuse" in await file.pread(len(clean), 100):
            msg = "refused"
            raise ImageError(msg)

    clean = build_image(4 * CLUSTER, {0: b"a"})
    options = OpenOptions(writable=True)
    for content, words in (
        (clean + b"tail", "4 bytes past the last whole cluster"),
        (build_image(4 * CLUSTER, features=2), "NEED_CHECK set"),
    ):
        path.write_bytes(content)
        with pytest.raises(NeedsCheckError, match=words):
            async with open_disk(str(path), options):
                pass
        async with open_disk(str(path)):
            pass
        assert path.read_bytes() == content
        async with open_disk(str(path), options, inspector=inspector) as disk:
            await disk.write(0, b"x")
        assert not header_of(path.read_bytes()).need_check
    assert asked == [0, 2]
    path.write_bytes(clean)
    async with open_disk(str(path), options, inspector=inspector):
        pass
    assert asked == [0, 2], "a clean image is not inspected"
    path.write_bytes(clean + b"refuse")
    with pytest.raises(ImageError, match="refused"):
        async with open_disk(str(path), options, inspector=inspector):
            pass
    assert path.read_bytes() == clean + b"refuse"


@SCANNED
async def test_partial_write_before_a_bad_entry_is_in_place() -> None:
    """A write that meets a bad entry has written everything before it, and nothing after."""
    image = image_with_data()
    put_entry(image, l2_entry_offset(image, 2), 512)
    file = RecordingFile(image)
    data = pattern(3 * CLUSTER, 1)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        with pytest.raises(CorruptImageError):
            await disk.write(CLUSTER, data)
        assert await disk.read(CLUSTER, CLUSTER) == data[:CLUSTER]
        assert await disk.read(3 * CLUSTER, 1) == b"\4"
    assert [len(change.data) for change in file.changes if isinstance(change, Write)] == [CLUSTER]
