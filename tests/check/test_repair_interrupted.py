"""A repair that is killed at any write: entries past the end never show data of others.

A repair makes the file longer, and so could make such an entry valid.  After every change,
and after power failures, the image is read in that state, repaired once more, and restored
from the backup.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.check.repair import RepairReport, plan_repair, repair_image
from qedfuse.hostio.imagefile import read_header
from qedfuse.tools.repair.backup import Backup
from qedfuse.tools.repair.undo import undo_repair
from tests.check.memoryimages import (
    BASE,
    CLUSTER_BYTES,
    DISK_BYTES,
    TABLE_SPAN_BYTES,
    assert_lossless,
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
    from collections.abc import Callable
    from pathlib import Path

Damage = tuple[bytearray, set[int]]
"""An image, and the guest clusters whose entries point past its end."""

ENTRIES: Final = TABLE_SPAN_BYTES // CLUSTER_BYTES
ZEROS: Final = bytes(CLUSTER_BYTES)


def image(backing: bytes) -> bytearray:
    """Build an image of two tables."""
    numbers = (*range(12), 100, 101, 102, 103, 600, 601)
    return build_image(
        DISK_BYTES, {number: pattern(CLUSTER_BYTES, number) for number in numbers}, backing=backing
    )


def share(content: bytearray, number: int, other: int) -> None:
    """Make two guest clusters share one of the file, so that a repair has to copy it."""
    value = get_entry(content, l2_entry_offset(content, other))
    put_entry(content, l2_entry_offset(content, number), value)


def point_past(content: bytearray, numbers: range | tuple[int, ...], skip: int = 0) -> set[int]:
    """Make the entries of guest clusters point to successive clusters past the end."""
    end = -(-len(content) // CLUSTER_BYTES) * CLUSTER_BYTES
    for index, number in enumerate(numbers, skip):
        put_entry(content, l2_entry_offset(content, number), end + index * CLUSTER_BYTES)
    return set(numbers)


def wild_clusters(backing: bytes) -> Damage:
    """Make L2 entries point to where shared clusters will be copied."""
    content = image(backing)
    share(content, 4, 0)
    share(content, 5, 1)
    return content, point_past(content, (100, 101))


def wild_clusters_and_a_tail(backing: bytes) -> Damage:
    """Do the same, and cut the last cluster short."""
    content, _ = wild_clusters(backing)
    del content[-100:]
    return content, point_past(content, (100, 101))


def wild_table(backing: bytes) -> Damage:
    """Make L1 entries point to where a copy of data will be."""
    content = image(backing)
    share(content, 4, 0)
    share(content, 5, 1)
    put_entry(content, l1_entry(content, 1), len(content) + CLUSTER_BYTES)
    put_entry(content, l1_entry(content, 2), len(content))
    return content, set(range(ENTRIES, 3 * ENTRIES))


def only_a_wild_table(backing: bytes) -> Damage:
    """Make an L1 entry point to where the first new table would be."""
    content = image(backing)
    put_entry(content, l1_entry(content, 2), len(content))
    return content, set(range(2 * ENTRIES, 3 * ENTRIES))


def table_over_data(backing: bytes) -> Damage:
    """Put wild entries into a table that must be copied; they point to where the copy will be."""
    content = image(backing)
    put_entry(content, l2_entry_offset(content, 600), get_entry(content, l1_entry(content, 0)))
    share(content, 4, 0)
    return content, point_past(content, (100, 101, 103)) | point_past(content, (102,), 1)


def one_table_twice(backing: bytes) -> Damage:
    """Make two L1 entries point to one table with wild entries."""
    content = image(backing)
    put_entry(content, l1_entry(content, 3), get_entry(content, l1_entry(content, 0)))
    lost = point_past(content, range(100, 104))
    return content, lost | {3 * ENTRIES + number for number in lost}


def table_cut_short(backing: bytes) -> Damage:
    """Cut the file within a table's entry; other entries point past the cut."""
    content = image(backing)
    table = move_table_to_the_end(content)
    del content[table + 8 * 300 + 3 :]
    share(content, 4, 0)
    return content, point_past(content, (100, 101)) | set(range(300, ENTRIES))


def table_cut_in_an_entry(backing: bytes) -> Damage:
    """Cut the file after the first bytes of an entry, which alone are the offset of other data."""
    content = image(backing)
    other = get_entry(content, l2_entry_offset(content, 5))
    put_entry(content, l2_entry_offset(content, 300), (1 << 16) + other)
    table = move_table_to_the_end(content)
    del content[table + 8 * 300 + 2 :]
    return content, set(range(300, ENTRIES))


def table_cut_short_over_data(backing: bytes) -> Damage:
    """Cut the file in an entry of a table that must be copied, because data lies there too."""
    content, lost = table_cut_in_an_entry(backing)
    put_entry(content, l2_entry_offset(content, 601), get_entry(content, l1_entry(content, 0)))
    return content, lost


KINDS: Final[dict[str, Callable[[bytes], Damage]]] = {
    "clusters": wild_clusters,
    "tail": wild_clusters_and_a_tail,
    "table": wild_table,
    "only-table": only_a_wild_table,
    "over-data": table_over_data,
    "twice": one_table_twice,
    "cut-short": table_cut_short,
    "cut-in-entry": table_cut_in_an_entry,
    "cut-over-data": table_cut_short_over_data,
}


def recorded(content: bytearray) -> tuple[RecordingFile, RepairReport]:
    """Repair an image on a file that records each change; return the file and the report."""

    async def work() -> tuple[RecordingFile, RepairReport]:
        file = RecordingFile(content)
        return file, await repair_image(file, await read_header(file))

    return trio.run(work)


def shows_nothing_else(state: bytearray, damage: set[int]) -> None:
    """Assert that each wild entry that is valid in this state refers to zeros."""
    header = header_of(state)
    for number in damage:
        table = get_entry(state, header.l1_table_offset + 8 * (number // ENTRIES))
        if table % CLUSTER_BYTES or not header.l1_end <= table <= len(state) - CLUSTER_BYTES:
            continue
        value = get_entry(state, table + 8 * (number % ENTRIES))
        if value % CLUSTER_BYTES == 0:
            assert not state[value : value + CLUSTER_BYTES].strip(b"\0") or not value, number


@pytest.mark.parametrize("backing", [b"", b"base.raw"], ids=["alone", "overlay"])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_past_the_end_never_show_other_data(kind: str, backing: bytes) -> None:
    """After a crash at any write and a second repair they read as zeros, other data as before."""
    content, wild = KINDS[kind](backing)
    base = BASE if backing else b""
    before = readable(content, base)
    file, result = recorded(content)
    reported = {
        number
        for item in result.lost
        for number in range(
            item.start // CLUSTER_BYTES, -(-(item.start + item.length) // CLUSTER_BYTES)
        )
    }
    assert wild <= reported
    chance = random.Random(kind)
    # Most states of power failures are equal to others.
    states = {bytes(state) for _number, state in file.prefixes()}
    for count in range(len(file.changes) + 1):
        states |= {bytes(file.power_loss(count, chance)) for _ in range(4)}
    for state in map(bytearray, sorted(states)):
        assert len(state) >= len(content)
        shows_nothing_else(state, wild)
        again = trio.run(repair, state)
        after = guest_bytes(state, base)
        for number in wild:
            assert cluster(after, number) == ZEROS, number
        assert_lossless(after, result.lost + again.lost, before)


@pytest.mark.parametrize("backing", [b"", b"base.raw"], ids=["alone", "overlay"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_repair_can_be_undone(kind: str, backing: bytes, tmp_path: Path) -> None:
    """The backup restores the image byte for byte after a crash at any write of the repair."""
    content, _wild = KINDS[kind](backing)

    attributes = tmp_path.stat()

    async def save() -> str:
        file = MemoryFile(content, writable=False)
        with Backup(str(tmp_path / "saved"), attributes) as backup:
            done = await plan_repair(file, await read_header(file), backup.save)
            backup.finish(len(content), done.end)
            return backup.path

    async def take_back(state: bytearray) -> bytearray:
        image = MemoryFile(state)
        await undo_repair(image, saved)
        return image.content

    saved = trio.run(save)
    file, _ = recorded(content)
    for _number, state in file.prefixes():
        assert trio.run(take_back, bytearray(state)) == content
