"""Repair loses no data that can be kept, reports all that is lost, and survives a crash."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.check import lostranges
from qedfuse.check.findings import Code, LostRange
from qedfuse.check.repair import RepairReport, repair_image
from qedfuse.errors import NeedsCheckError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.header import Header, build_header
from tests.check.memoryimages import (
    BASE,
    CLUSTER_BYTES,
    DISK_BYTES,
    TABLE_SPAN_BYTES,
    assert_lossless,
    check,
    cluster,
    l1_entry,
    move_table_to_the_end,
    readable,
    repair,
)
from tests.support.disks import (
    build_image,
    get_entry,
    guest_bytes,
    header_of,
    l2_entry_offset,
    pattern,
    put_entry,
)
from tests.support.hostfiles import MemoryFile, RecordingFile

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_lost_table_of_an_overlay_hides_the_base() -> None:
    """A lost table of an overlay becomes zeros, as reported; other ranges show the base."""
    content = build_image(
        DISK_BYTES, {0: pattern(CLUSTER_BYTES, 1), 600: b"x"}, backing=b"base.raw"
    )
    put_entry(content, l1_entry(content, 1), 123)
    result = await repair(content)
    assert result.lost == (LostRange(TABLE_SPAN_BYTES, TABLE_SPAN_BYTES, Code.L1_RESERVED_BITS),)
    after = guest_bytes(content, BASE)
    assert not any(after[TABLE_SPAN_BYTES : 2 * TABLE_SPAN_BYTES])
    assert cluster(after, 0) == pattern(CLUSTER_BYTES, 1)
    assert after[CLUSTER_BYTES:TABLE_SPAN_BYTES] == BASE[CLUSTER_BYTES:TABLE_SPAN_BYTES]
    assert after[2 * TABLE_SPAN_BYTES :] == BASE[2 * TABLE_SPAN_BYTES :]


@pytest.mark.parametrize("backing", [b"", b"base.raw"])
@pytest.mark.parametrize("cut", [4, 100, 5000, 3 * CLUSTER_BYTES])
async def test_a_table_cut_short_keeps_its_remaining_entries(cut: int, backing: bytes) -> None:
    """A table cut short keeps its entries; exactly the missing ones are reported as lost."""
    entries = 4 * CLUSTER_BYTES // 8
    content = build_image(
        4 * entries * CLUSTER_BYTES,
        {
            0: pattern(CLUSTER_BYTES, 1),
            300: pattern(CLUSTER_BYTES, 2),
            entries - 1: pattern(CLUSTER_BYTES, 3),
        },
        table_size=4,
        backing=backing,
    )
    base = b"\xbb" * (4 * entries * CLUSTER_BYTES) if backing else b""
    move_table_to_the_end(content, table_bytes=4 * CLUSTER_BYTES)
    del content[-cut:]
    result = await repair(content)
    missing = -(-cut // 8)
    start = (entries - missing) * CLUSTER_BYTES
    assert result.lost == (LostRange(start, missing * CLUSTER_BYTES, Code.L1_CUT_SHORT),)
    after = guest_bytes(content, base)
    assert cluster(after, 0) == pattern(CLUSTER_BYTES, 1)
    assert cluster(after, 300) == pattern(CLUSTER_BYTES, 2)
    assert not any(after[start : entries * CLUSTER_BYTES])
    assert cluster(after, 7) == (base or bytes(CLUSTER_BYTES))[:CLUSTER_BYTES]


@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("table_size", [1, 2])
@pytest.mark.parametrize("backing", [b"", b"base.raw"], ids=["alone", "overlay"])
@pytest.mark.parametrize("cut", [1, 4, 8, 1001, CLUSTER_BYTES - 11])
async def test_completing_a_table_changes_no_data_under_it(
    cut: int, backing: bytes, table_size: int, references: int
) -> None:
    """Data that lies at a cut end, under a table that moves, keeps its bytes, and zeros follow."""
    entries = table_size * CLUSTER_BYTES // 8
    disk_bytes = 4 * entries * CLUSTER_BYTES
    numbers = (0, entries, 2 * entries)
    content = build_image(
        disk_bytes,
        {number: pattern(CLUSTER_BYTES, number) for number in numbers},
        table_size=table_size,
        backing=backing,
    )
    table = move_table_to_the_end(content, table_bytes=table_size * CLUSTER_BYTES)
    last_cluster = table + (table_size - 1) * CLUSTER_BYTES
    # Guest data, which as table entries would be invalid.
    content[last_cluster + 64 :] = b"\x03" * (CLUSTER_BYTES - 64)
    for number in numbers[1 : 1 + references]:
        put_entry(content, l2_entry_offset(content, number), last_cluster)
    del content[-cut:]
    kept = bytes(content[last_cluster:])
    await repair(content)
    after = guest_bytes(content, b"\xbb" * disk_bytes if backing else b"")
    for number in numbers[1 : 1 + references]:
        assert cluster(after, number) == kept.ljust(CLUSTER_BYTES, b"\0")
    assert cluster(after, 0) == pattern(CLUSTER_BYTES, 0)
    assert not any(cluster(after, entries - 1)), "an entry that was cut off shows the base"


async def test_a_table_over_the_l1_table_is_not_completed() -> None:
    """A table that overlaps the L1 table and is cut short is cleared, not completed."""
    content = build_image(DISK_BYTES, table_size=2)
    damaged = bytearray(content)
    put_entry(damaged, l1_entry(damaged, 0), l1_entry(damaged, 0) + CLUSTER_BYTES)
    result = await repair(damaged)
    assert [item.code for item in result.lost] == [Code.L1_OVER_METADATA]
    assert damaged == content


async def test_data_under_a_wild_table_stays() -> None:
    """An L1 entry that points to a data cluster does not cost the guest that cluster."""
    numbers = (3, 0, 7)
    content = build_image(
        DISK_BYTES, {number: pattern(CLUSTER_BYTES, number) for number in numbers}
    )
    offset = get_entry(content, l2_entry_offset(content, 7))
    put_entry(content, l1_entry(content, 1), offset)
    result = await repair(content)
    after = guest_bytes(content)
    for number in numbers:
        assert cluster(after, number) == pattern(CLUSTER_BYTES, number)
    assert get_entry(content, l2_entry_offset(content, 7)) == offset, "moved without need"
    assert {item.start for item in result.lost} == {7 * CLUSTER_BYTES, TABLE_SPAN_BYTES}


async def test_a_wild_entry_over_a_table_does_not_cost_the_table() -> None:
    """An L2 entry that points to a table is lost, and the table's mapping stays."""
    content = build_image(
        DISK_BYTES, {0: pattern(CLUSTER_BYTES, 1), 1: b"x", 600: pattern(CLUSTER_BYTES, 2)}
    )
    put_entry(content, l2_entry_offset(content, 600), get_entry(content, l1_entry(content, 0)))
    result = await repair(content)
    assert result.lost == (LostRange(600 * CLUSTER_BYTES, CLUSTER_BYTES, Code.L2_OVER_METADATA),)
    assert cluster(guest_bytes(content), 0) == pattern(CLUSTER_BYTES, 1)


async def test_clusters_past_the_disk_are_not_copied() -> None:
    """A repair copies no shared clusters past the disk's end, so it cannot fill the host."""
    content = build_image(1 << 20, {number: pattern(CLUSTER_BYTES, number) for number in range(20)})
    before = guest_bytes(content)
    for index in range(1, 400):
        put_entry(content, l1_entry(content, index), get_entry(content, l1_entry(content, 0)))
    table = get_entry(content, l1_entry(content, 0))
    for index in range(256, 512):
        put_entry(content, table + 8 * index, get_entry(content, table))
    length = len(content)
    result = await repair(content)
    assert (result.copied, result.lost) == (0, ())
    assert len(content) == length
    assert guest_bytes(content) == before


def test_a_copy_of_a_hole_is_a_hole(tmp_path: Path) -> None:
    """Copies of tables of 1 GiB that are holes are holes again."""
    header = Header(1 << 26, 16, 1, 0, 0, 0, 1 << 26, 1 << 62)
    path = tmp_path / "sparse.qed"
    with path.open("wb") as file:
        file.truncate(8 << 30)
        file.write(build_header(header))
        file.seek(header.l1_table_offset)
        file.write((4 << 30).to_bytes(8, "little") * 3)
    handle = PosixFile.open(str(path), writable=True)
    try:
        result = trio.run(repair_image, handle, header)
    finally:
        handle.close()
    assert result.after.errors == 0
    assert path.stat().st_size == 10 << 30
    assert path.stat().st_blocks * 512 < 1 << 20


async def test_a_refusal_comes_before_any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is too large to check is refused before NEED_CHECK or anything else changes."""
    content = build_image(DISK_BYTES, {0: b"x", 600: b"y", 1100: 2})
    monkeypatch.setattr("qedfuse.check.tables.MAX_TABLES", 2)
    file = MemoryFile(content)
    header = await read_header(file)
    with pytest.raises(NeedsCheckError, match="too large to check: found more than 2 L1 entries"):
        await repair_image(file, header)
    assert file.content == content


async def test_lost_ranges_are_bounded_and_cover_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond a limit the last lost range covers all further ones, with what lies between them."""
    monkeypatch.setattr(lostranges, "MAX_LOST_RANGES", 3)
    content = build_image(DISK_BYTES, dict.fromkeys(range(0, 1000, 2), 3))
    lost = (await repair(content)).lost
    assert len(lost) == 3
    assert all(
        any(item.start <= number * CLUSTER_BYTES < item.start + item.length for item in lost)
        for number in range(0, 1000, 2)
    )


def damaged(chance: random.Random, backing: bytes = b"") -> bytearray:
    """Build an image with several kinds of damage."""
    numbers = chance.sample(range(DISK_BYTES // CLUSTER_BYTES), 16)
    content = build_image(
        DISK_BYTES, {number: pattern(CLUSTER_BYTES, number) for number in numbers}, backing=backing
    )
    offsets = [l1_entry(content, index) for index in range(4)]
    tables = [get_entry(content, offset) for offset in offsets]
    entries = [l2_entry_offset(content, number) for number in numbers]
    inside = [get_entry(content, entry) for entry in entries]
    end = len(content)
    wild = [8, CLUSTER_BYTES, end - CLUSTER_BYTES, end, end + CLUSTER_BYTES, 1 << 50]
    for _ in range(3):
        put_entry(content, chance.choice(entries), chance.choice([*inside, *tables, *wild]))
    put_entry(content, chance.choice(offsets), chance.choice([*inside, *tables, *wild]))
    if chance.random() < 0.3:
        del content[-chance.randrange(1, 2 * CLUSTER_BYTES) :]
    return content


@given(st.integers(0, 1 << 32), st.booleans())
def test_ranges_that_are_not_reported_read_as_before(seed: int, overlay: bool) -> None:  # noqa: FBT001
    """After a repair of random damage, each range that is not reported as lost reads as before."""
    content = damaged(random.Random(seed), b"base.raw" if overlay else b"")
    base = BASE if overlay else b""
    before = readable(content, base)
    lost = trio.run(repair, content).lost
    assert_lossless(guest_bytes(content, base), lost, before)


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_repair_can_be_repeated(seed: int) -> None:
    """A crash at any write leaves NEED_CHECK or no error; a second repair loses nothing more."""
    chance = random.Random(seed)
    content = damaged(chance)
    size = len(content)
    before = readable(content, b"")

    async def first() -> tuple[RecordingFile, RepairReport]:
        file = RecordingFile(content)
        return file, await repair_image(file, await read_header(file))

    file, result = trio.run(first)
    states = {bytes(prefix) for _number, prefix in file.prefixes()}
    states |= {bytes(file.power_loss(count, chance)) for count in range(len(file.changes) + 1)}
    for state in map(bytearray, sorted(states)):
        assert len(state) >= size, "the file became shorter"
        found = trio.run(check, state)
        assert header_of(state).need_check or not found.errors or state[:64] == content[:64]
        again = trio.run(repair, state)
        assert_lossless(guest_bytes(state), result.lost + again.lost, before)


def test_a_second_repair_changes_nothing(tmp_path: Path) -> None:
    """A repair of a repaired image does not change it, not even the file's times."""
    content = damaged(random.Random(3))
    trio.run(repair, content)
    path = tmp_path / "again.qed"
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    handle = PosixFile.open(str(path), writable=True)
    try:
        trio.run(repair_image, handle, header_of(content))
    finally:
        handle.close()
    assert path.stat().st_mtime_ns == 1
