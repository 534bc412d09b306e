"""Each kind of finding once: damage, find, repair, clean; and random damage compared with QEMU."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.check.checker import check_image
from qedfuse.check.findings import MAX_FINDINGS_PER_CODE, CheckReport, Code, Severity
from qedfuse.check.repair import plan_repair, repair_image
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.errors import NeedsCheckError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import Feature
from tests.check.memoryimages import check, l1_entry, repair
from tests.support import qemu
from tests.support.disks import (
    build_image,
    get_entry,
    guest_bytes,
    header_of,
    inspect_image,
    l2_entry_offset,
    pattern,
    put_entry,
)
from tests.support.freelists import DESCRIPTOR, listed, put_list
from tests.support.hostfiles import MemoryFile
from tests.support.share import share

if TYPE_CHECKING:
    from collections.abc import Callable


CLUSTER_BYTES: Final = 8192
ENTRIES: Final = CLUSTER_BYTES // 8
DISK_BYTES: Final = 2 * ENTRIES * CLUSTER_BYTES
CLUSTERS: Final = {number: pattern(CLUSTER_BYTES, number) for number in (3, 0, 7, 1100, 1101, 5)}
"""Guest clusters with data, in the order in which they lie in the file; two L2 tables."""


def image(**options: int | bytes) -> bytearray:
    """Build the image that the tests damage."""
    return build_image(DISK_BYTES, CLUSTERS, cluster_size=CLUSTER_BYTES, table_size=1, **options)  # type: ignore[arg-type]


def set_l2(number: int, value: Callable[[bytearray], int]) -> Callable[[bytearray], None]:
    """Overwrite the entry of a guest cluster."""
    return lambda content: put_entry(content, l2_entry_offset(content, number), value(content))


def set_l1(index: int, value: Callable[[bytearray], int]) -> Callable[[bytearray], None]:
    """Overwrite an L1 entry."""
    return lambda content: put_entry(content, l1_entry(content, index), value(content))


def set_header(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    """Overwrite a header field."""
    return lambda content: struct.pack_into(layout, content, offset, value)


def cut(length: int) -> Callable[[bytearray], None]:
    """Cut bytes off the end."""

    def change(content: bytearray) -> None:
        del content[-length:]

    return change


def add(length: int) -> Callable[[bytearray], None]:
    """Add bytes to the end."""
    return lambda content: content.extend(b"x" * length)


def no_probe_without_backing(content: bytearray) -> None:
    """Set BACKING_FORMAT_NO_PROBE without a backing file."""
    struct.pack_into("<Q", content, 16, int(Feature.BACKING_FORMAT_NO_PROBE))


def name_in_fixed_header(content: bytearray) -> None:
    """Place the backing file's name within the header's own fields."""
    struct.pack_into("<Q", content, 16, int(Feature.BACKING_FILE))
    struct.pack_into("<II", content, 56, 8, 2)


def cut_table_short(content: bytearray) -> None:
    """Move the second table to the end of the file, and cut off its end."""
    entry = l1_entry(content, 1)
    table = get_entry(content, entry)
    put_entry(content, entry, len(content))
    content.extend(content[table : table + 8 * 77])


def add_free(content: bytearray, count: int) -> int:
    """Add free clusters and a used one behind them; give the first."""
    free = len(content) // CLUSTER_BYTES
    content.extend(bytes((count + 1) * CLUSTER_BYTES))
    put_entry(content, l2_entry_offset(content, 10), (free + count) * CLUSTER_BYTES)
    return free


def listed_and_used(content: bytearray) -> None:
    """List two clusters as free, and then refer to one of them."""
    free = add_free(content, 2)
    put_list(content, [(free, 2)])
    put_entry(content, l2_entry_offset(content, 9), (free + 1) * CLUSTER_BYTES)


CASES: Final[dict[Code, tuple[Callable[[bytearray], None], frozenset[int]]]] = {
    # code: (damage, guest clusters that are lost)
    Code.L1_RESERVED_BITS: (set_l1(0, lambda _c: 1), frozenset(range(ENTRIES))),
    Code.L1_UNALIGNED: (
        set_l1(0, lambda c: get_entry(c, l1_entry(c, 0)) + 4096),
        frozenset(range(ENTRIES)),
    ),
    Code.L1_OUT_OF_FILE: (set_l1(1, len), frozenset(range(ENTRIES, 2 * ENTRIES))),
    Code.L1_CUT_SHORT: (cut_table_short, frozenset(range(ENTRIES + 77, 2 * ENTRIES))),
    Code.L1_OVER_METADATA: (
        set_l1(1, lambda _c: CLUSTER_BYTES),
        frozenset(range(ENTRIES, 2 * ENTRIES)),
    ),
    Code.TABLE_OVERLAP: (set_l1(2, lambda c: get_entry(c, l1_entry(c, 0))), frozenset()),
    Code.L2_RESERVED_BITS: (set_l2(3, lambda _c: 2), frozenset({3})),
    Code.L2_UNALIGNED: (set_l2(3, lambda _c: 3 * 4096), frozenset({3})),
    Code.L2_OUT_OF_FILE: (set_l2(1100, lambda _c: 1 << 62), frozenset({1100})),
    Code.L2_CUT_SHORT: (cut(100), frozenset({5})),
    Code.L2_OVER_METADATA: (set_l2(7, lambda c: get_entry(c, l1_entry(c, 1))), frozenset({7})),
    Code.DUPLICATE_CLUSTER: (
        set_l2(9, lambda c: get_entry(c, l2_entry_offset(c, 1101))),
        frozenset(),
    ),
    Code.FREE_LIST_BAD: (set_header(16, "<Q", int(Feature.FREE_LIST)), frozenset()),
    Code.FREE_LIST_CONTRADICTED: (listed_and_used, frozenset()),
    Code.LEAKED_CLUSTERS: (add(3 * CLUSTER_BYTES), frozenset()),
    Code.HEADER_SIZE_ZERO: (set_header(12, "<I", 0), frozenset()),
    Code.NAME_IN_FIXED_HEADER: (name_in_fixed_header, frozenset()),
    Code.BACKING_NAME_EMPTY: (set_header(16, "<Q", int(Feature.BACKING_FILE)), frozenset()),
    Code.NO_PROBE_WITHOUT_BACKING: (no_probe_without_backing, frozenset()),
    Code.NEED_CHECK_SET: (set_header(16, "<Q", int(Feature.NEED_CHECK)), frozenset()),
    Code.UNKNOWN_COMPAT: (set_header(24, "<Q", 1 << 40), frozenset()),
    Code.UNKNOWN_AUTOCLEAR: (set_header(32, "<Q", 3), frozenset()),
    Code.ODD_TAIL: (add(7), frozenset()),
    Code.PAST_IMAGE_SIZE: (set_header(48, "<Q", 1101 * CLUSTER_BYTES), frozenset()),
    Code.MOSTLY_LEAKED: (add(40 * CLUSTER_BYTES), frozenset()),
}


def test_every_code_has_a_case() -> None:
    """Each code of a finding has a case here."""
    assert set(CASES) == set(Code)


@pytest.mark.parametrize("code", Code, ids=lambda code: code.value)
async def test_damage_is_found_and_repaired_and_other_data_stays(code: Code) -> None:
    """The check finds the code, and a repair leaves no error and keeps every other cluster."""
    damage, lost = CASES[code]
    content = image()
    expected = bytearray(guest_bytes(content))
    damage(content)

    found = await check(content)
    assert code in found.counts
    message = next(item.message for item in found.findings if item.code is code)
    assert "\n" not in message
    assert "found" in message
    worse = {item for item in found.counts if item.severity is Severity.ERROR} - {code}
    if code is Code.TABLE_OVERLAP:
        worse -= {Code.DUPLICATE_CLUSTER}
    assert not worse

    result = await repair(content)
    assert result.after.errors == 0
    assert inspect_image(content).errors == ()
    assert not header_of(content).need_check
    assert (await check(content)).errors == 0
    if code in (Code.NAME_IN_FIXED_HEADER, Code.BACKING_NAME_EMPTY):
        return  # the header now names a base that is not there
    after = guest_bytes(content)
    size = len(after)
    reported = {item.start // CLUSTER_BYTES + offset for item in result.lost
                for offset in range(-(-item.length // CLUSTER_BYTES))}  # fmt: skip
    assert reported == {number for number in lost if number * CLUSTER_BYTES < size}
    if code is Code.TABLE_OVERLAP:
        # Two guest ranges read the same before; they still do, each with its own clusters.
        span = ENTRIES * CLUSTER_BYTES
        expected[2 * span : 3 * span] = expected[:span]
    if code is Code.DUPLICATE_CLUSTER:
        expected[9 * CLUSTER_BYTES : 10 * CLUSTER_BYTES] = CLUSTERS[1101]
    for number in range(size // CLUSTER_BYTES):
        if number not in lost:
            part = slice(number * CLUSTER_BYTES, (number + 1) * CLUSTER_BYTES)
            assert after[part] == expected[part], number


async def test_a_lost_cluster_of_an_overlay_becomes_zeros() -> None:
    """A repair of an overlay replaces a bad entry by a zero cluster, which hides the base."""
    content = image(backing=b"base.raw")
    put_entry(content, l2_entry_offset(content, 3), 2)
    await repair(content)
    assert get_entry(content, l2_entry_offset(content, 3)) == 1


async def test_a_repair_of_a_sound_image_changes_nothing() -> None:
    """A sound image has no findings, and a repair does not change a byte."""
    content = image()
    before = bytes(content)
    found = await check(content)
    assert (found.counts, found.findings) == ({}, ())
    assert found.allocated_clusters == len(CLUSTERS)
    await repair(content)
    assert content == before


async def test_listed_clusters_are_not_leaked() -> None:
    """Clusters of a good free list are no finding; free clusters that it lacks are leaks."""
    content = image()
    free = add_free(content, 100)
    put_list(content, [(free + 3, 1), (free + 5, 90)])
    before = bytes(content)
    found = await check(content)
    assert (found.errors, found.leaks, found.listed_clusters) == (0, 9, 91)
    leaks = next(item for item in found.findings if item.code is Code.LEAKED_CLUSTERS)
    runs = [f"{count} at {(free + n) * CLUSTER_BYTES}" for count, n in ((3, 0), (1, 4), (5, 95))]
    assert ", ".join(runs) in leaks.message
    assert found.as_json()["listed_clusters"] == 91
    await repair(content)
    assert content == before
    assert (await check(image())).listed_clusters is None


async def test_a_repair_drops_the_list() -> None:
    """Any repair drops the free list, which it does not keep up to date."""
    for damage in (
        set_l2(3, lambda _c: 2),
        set_header(16, "<Q", int(Feature.FREE_LIST | Feature.NEED_CHECK)),
    ):
        content = image()
        add_free(content, 2)
        put_list(content)
        damage(content)
        result = await repair(content)
        assert result.after.listed_clusters is None
        assert listed(content) is None
        assert not any(content[DESCRIPTOR : DESCRIPTOR + 512])
        found = await check(content)
        assert set(found.counts) == {Code.LEAKED_CLUSTERS}
        assert found.leaks >= 2


async def test_a_plan_saves_what_the_repair_changes() -> None:
    """The backup gets the old bytes of each change, so that a repair can be undone."""
    content = image()
    put_entry(content, l2_entry_offset(content, 3), 2)
    put_entry(content, l1_entry(content, 2), 8)
    damaged = bytes(content)
    saved: list[tuple[int, bytes, bytes]] = []
    file = MemoryFile(content)
    header = await read_header(file)
    await plan_repair(file, header, lambda *piece: saved.append(piece))
    assert file.content == damaged
    await repair_image(file, header)
    restored = bytearray(file.content)
    for offset, old, new in saved:
        assert file.content[offset : offset + len(new)] == new
        restored[offset : offset + len(old)] = old
    assert restored[: len(damaged)] == damaged


async def test_many_findings_are_counted_but_not_all_kept() -> None:
    """Findings beyond a limit are counted but not kept: a hostile image cannot fill the memory."""
    content = build_image(DISK_BYTES, dict.fromkeys(range(500), 3))
    found = await check(content)
    assert found.counts[Code.L2_RESERVED_BITS] == 500
    assert len(found.findings) == MAX_FINDINGS_PER_CODE
    assert found.as_json()["errors"] == 500


def test_sorted_owners_agree_with_the_bitmap() -> None:
    """The sorted form of the owners, for huge files, answers like the bitmap."""
    import numpy as np  # noqa: PLC0415

    chance = random.Random(5)
    small, huge = OwnerBitmap(4000, "small"), OwnerBitmap(1 << 50, "huge")
    for _ in range(200):
        numbers = [chance.randrange(4000) for _ in range(chance.randrange(40))]
        clusters = np.array(numbers, np.uint64)
        assert (small.claim(clusters) == huge.claim(clusters)).all()
    small.claim_range(10, 300)
    huge.claim_range(10, 300)
    assert small.count == huge.count


def test_too_many_references_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that cannot be checked in bounded memory is refused with a message."""
    import numpy as np  # noqa: PLC0415

    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_LISTED_CLUSTERS", 10)
    with pytest.raises(NeedsCheckError, match="too large to check"):
        OwnerBitmap(1 << 50, "huge").claim(np.arange(11, dtype=np.uint64))


def damage_at_random(content: bytearray, chance: random.Random) -> None:
    """Overwrite a few entries, and sometimes cut off the end."""
    header = header_of(content)
    entries = [header.l1_table_offset + 8 * index for index in range(3)]
    tables = [get_entry(content, offset) for offset in entries]
    entries += [table + 8 * index for table in tables if table for index in range(12)]
    size = len(content)
    for _ in range(chance.randrange(1, 4)):
        wild = [0, 1, 2, 512, size, size + header.cluster_size, 1 << 62, chance.randrange(size)]
        inside = chance.randrange(size // header.cluster_size) * header.cluster_size
        put_entry(content, chance.choice(entries), chance.choice([*wild, inside, *tables]))
    if chance.random() < 0.3:
        cut(chance.choice([1, 100, header.cluster_size, header.cluster_size + 100]))(content)


@given(st.integers(0, 1 << 32))
def test_random_damage_is_always_found_and_repaired(seed: int) -> None:
    """After random overwrites the check ends and agrees with a simple one, and a repair heals."""
    chance = random.Random(seed)
    numbers = chance.sample(range(DISK_BYTES // CLUSTER_BYTES), 30)
    content = build_image(
        DISK_BYTES, {number: pattern(CLUSTER_BYTES, number) for number in numbers}
    )
    damage_at_random(content, chance)
    found = trio.run(check, content)
    plain = inspect_image(content)
    assert bool(found.errors) == bool(plain.errors)
    result = trio.run(repair, content)
    assert result.after.errors == 0
    assert inspect_image(content).errors == ()
    before = bytes(content)
    assert not trio.run(repair, content).lost
    assert content == before, "a second repair changed something"


@pytest.mark.parametrize("seed", range(share(12, of=40)))
def test_qemu_agrees_with_the_check_and_the_repair(seed: int, tmp_path: Path) -> None:
    """qemu-img check agrees on random damage, except for a last cluster that is cut short."""
    chance = random.Random(seed)
    size, table = chance.choice([(4096, 2), (8192, 4), (65536, 2)])
    numbers = chance.sample(range(DISK_BYTES // size), 20)
    content = build_image(
        DISK_BYTES, {number: pattern(size, number) for number in numbers},
        cluster_size=size, table_size=table,
    )  # fmt: skip
    damage_at_random(content, chance)
    path = tmp_path / "damaged.qed"
    path.write_bytes(content)
    found = trio.run(check, content)
    ours = 2 if found.errors else 3 if found.leaks else 0
    if Code.L2_CUT_SHORT not in found.counts:
        assert qemu.check(path).code == ours
    trio.run(repair, content)
    path.write_bytes(content)
    assert qemu.check(path).code in (0, 3)


def bytes_read() -> int:
    """Return how many bytes this process has read by system calls."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


def test_holes_in_tables_are_skipped(tmp_path: Path) -> None:
    """Tables of 1 GiB that are holes of the file are skipped instead of read."""
    header = header_of(build_image(512, cluster_size=1 << 26, table_size=16))
    path = tmp_path / "sparse.qed"
    with path.open("wb") as file:
        file.truncate(4 << 40)
    handle = PosixFile.open(str(path), writable=True)

    async def work() -> CheckReport:
        for index in range(64):
            offset = (2 << 30) + (index << 30)
            await handle.pwrite(header.l1_table_offset + 8 * index, offset.to_bytes(8, "little"))
        before = bytes_read()
        found = await check_image(handle, header)
        # The L1 table has blocks on the host, so the slice with its entries is read.
        assert bytes_read() - before < 1 << 20
        return found

    try:
        found = trio.run(work)
    finally:
        handle.close()
    assert found.errors == 0
    assert found.counts[Code.LEAKED_CLUSTERS] == (4 << 40 >> 26) - 1 - 16 - 64 * 16
