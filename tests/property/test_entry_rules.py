"""Every reader of table entries draws the line between valid and invalid at the same place.

The disk (read-only and writable), the check, the fast check, ``qedimg info``, the fast map,
the map and the dump are given the same random images, whose entries are offsets close to
every limit.  A plain restatement of the specification, range against range, says which
entries are valid.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from qedfuse.check.checker import check_image
from qedfuse.check.fastcheck import fast_check
from qedfuse.check.findings import Code, Severity
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import ZERO
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.entryrules import EntryRules, Violation
from qedfuse.ondisk.header import Header, build_header
from qedfuse.tools.inspection.dump import open_dump
from qedfuse.tools.inspection.fastmap import open_fast_map
from qedfuse.tools.inspection.info import describe
from qedfuse.tools.inspection.mapping import map_image
from tests.support.extensions import needs_extensions
from tests.support.share import ALL

if TYPE_CHECKING:
    from pathlib import Path

SEEDS: Final = range(40)
HUGE: Final = (1 << 40, (1 << 63) - 4096, (1 << 64) - 4096, (1 << 64) - 1)


@dataclass(frozen=True)
class Case:
    """A random image.

    Attributes:
        header: Its header.
        size: Length of the file in bytes.
        l1: The entries of its L1 table, as many as the disk uses.
        l2: The entries in use of each valid L2 table, by index, by L1 index.
    """

    path: str
    header: Header
    size: int
    l1: dict[int, int]
    l2: dict[int, dict[int, int]]

    def is_apart(self, start: int, length: int, tables: tuple[int, ...] = ()) -> bool:
        """Return whether a range overlaps neither the header nor a table."""
        table_bytes = self.header.geometry.table_bytes
        taken = [(0, self.header.header_end), (self.header.l1_table_offset, self.header.l1_end)]
        taken += [(table, table + table_bytes) for table in tables]
        return not any(start < last and first < start + length for first, last in taken)

    def is_table(self, value: int) -> bool:
        """Return whether an L1 entry may be the file offset of an L2 table."""
        length = self.header.geometry.table_bytes
        aligned = value % self.header.cluster_size == 0
        return aligned and value + length <= self.size and self.is_apart(value, length)

    def is_cluster(self, value: int, *, whole: bool = True) -> bool:
        """Return whether an L2 entry may be the file offset of a data cluster."""
        length = self.header.cluster_size
        end = value + length if whole else value + 1
        aligned = value % length == 0
        tables = tuple(value for value in self.l1.values() if self.is_table(value))
        return aligned and end <= self.size and self.is_apart(value, length, tables)

    @property
    def bad_l1(self) -> set[int]:
        """The indices of the L1 entries that are invalid."""
        return {index for index, value in self.l1.items() if value and not self.is_table(value)}

    def bad_clusters(self, *, whole: bool = True) -> set[int]:
        """Return the numbers of the guest clusters that no reader may show."""
        entries = self.header.geometry.entries
        below = {l1_index * entries + index for l1_index in self.bad_l1 for index in range(entries)}
        bad = {
            l1_index * entries + index
            for l1_index, table in self.l2.items()
            for index, value in table.items()
            if value > ZERO and not self.is_cluster(value, whole=whole)
        }
        return (below | bad) & set(range(self.header.geometry.clusters(self.header.image_size)))

    def clusters(self) -> list[int]:
        """Return the numbers of the guest clusters that the disk is asked for, or all.

        These are the clusters whose entries are not 0, their neighbours, the first and the last
        cluster of each table, also of an invalid one, and some others.
        """
        total = self.header.geometry.clusters(self.header.image_size)
        if ALL:
            return list(range(total))
        entries = self.header.geometry.entries
        chosen = set(random.Random(self.size).sample(range(total), min(total, 40 * len(self.l1))))
        for l1_index in self.l1:
            first = l1_index * entries
            chosen |= {first, first + entries - 1, total - 1}
            for index in self.l2.get(l1_index, ()):
                chosen |= {first + index + step for step in (-1, 0, 1)}
        return sorted(chosen & set(range(total)))


def around(offset: int, cluster_size: int) -> list[int]:
    """Give entries close to a limit: a cluster before it, at it, behind it, and unaligned."""
    return [
        max(0, offset + step)
        for step in (-cluster_size, -4096, -512, -8, 0, 1, 8, 512, 4096, cluster_size)
    ]


def make_case(seed: int, directory: Path) -> Case:
    """Write a random image; about one in three has only valid entries."""
    choice = random.Random(seed)
    cluster_size = choice.choice((4096, 8192, 16384))
    table_size = choice.choice((1, 2, 4))
    header_size = choice.choice((0, 1, 2))
    before_l1 = choice.choice((0, 1, 6))
    l1_start = (max(1, header_size) + before_l1) * cluster_size
    used = choice.randrange(1, 4)
    span = cluster_size * table_size * cluster_size // 8
    image_size = used * span - choice.choice((0, cluster_size, 512, 5 * cluster_size + 1024))
    header = Header(cluster_size, table_size, header_size, 0, 0, 0, l1_start, image_size)
    geometry = header.geometry
    first_table = header.l1_end + choice.randrange(2) * cluster_size
    slots = [first_table + number * (geometry.table_bytes + cluster_size) for number in range(used)]
    size = slots[-1] + geometry.table_bytes + choice.randrange(1, 6) * cluster_size
    size -= choice.choice((0, 0, 0, 100, cluster_size - 8))
    limits = [header.header_end, l1_start, header.l1_end, size, *slots]
    limits += [slot + geometry.table_bytes for slot in slots]
    near = [value for limit in limits for value in around(limit, cluster_size)]
    near += [size - geometry.table_bytes, l1_start - geometry.table_bytes, 1, 2, *HUGE]
    sound = seed % 3 == 0
    l1 = dict(enumerate(slots))
    case = Case(str(directory / f"{seed}.qed"), header, size, l1, {})
    if not sound:
        # Overlapping tables are another rule; here L1 entries are either valid or invalid.
        invalid = [value for value in near if value > 0 and not case.is_table(value)]
        for index in choice.sample(sorted(l1), choice.randrange(used + 1)):
            l1[index] = choice.choice([0, *invalid])
    free = [
        value
        for value in range(0, size, cluster_size)
        if case.is_cluster(value) and value not in slots
    ]
    content = bytearray(size)
    content[:64] = build_header(header)
    for l1_index, table in l1.items():
        put(content, l1_start + 8 * l1_index, table)
        inside = geometry.clusters(min(span, image_size - l1_index * span))
        if not table or l1_index in case.bad_l1:
            continue
        entries = case.l2[l1_index] = {}
        for index in choice.sample(range(inside), 12):
            if sound or choice.random() < 0.3:
                entries[index] = free.pop() if free else ZERO
            else:
                entries[index] = choice.choice(near)
            put(content, table + 8 * index, entries[index])
    with open(case.path, "wb") as file:  # noqa: PTH123
        file.write(content)
    return case


def put(content: bytearray, offset: int, value: int) -> None:
    """Write one table entry."""
    content[offset : offset + 8] = value.to_bytes(8, "little")


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """Write a random image."""
    return make_case(request.param, tmp_path)


def test_both_forms_of_the_rules_agree_with_the_specification(case: Case) -> None:
    """Plain numbers, masks and classification say the same of every entry."""
    l1 = EntryLimits.for_l1(case.header, case.size)
    l2 = EntryLimits.for_l2(case.header, case.size)
    tables = np.array(sorted(v for v in case.l1.values() if case.is_table(v)), np.uint64)
    entries = [*case.l1.values(), *(v for table in case.l2.values() for v in table.values())]
    values = np.array([value for value in entries if value > ZERO] or [2], np.uint64)
    wholes = [case.is_cluster(value) for value in values.tolist()]
    begun = [case.is_cluster(value, whole=False) for value in values.tolist()]
    for rules, expected in (
        (EntryRules(l1), [case.is_table(value) for value in values.tolist()]),
        (EntryRules(l2, tables), wholes),
        (EntryRules(l2, tables, allow_cut_short=True), begun),
    ):
        assert rules.valid_mask(values).tolist() == expected
        bad = rules.invalid_mask(values)
        assert [not value for value in expected] == (
            [False] * len(values) if bad is None else bad.tolist()
        )
        found = dict(rules.violations(values))
        if rules.allow_cut_short:
            del found[Violation.CUT_SHORT]
        masks = np.array(list(found.values())).sum(axis=0)
        assert (masks == ~np.array(expected)).all(), "each in one mask"
    assert [l1.is_valid(value) for value in values.tolist()] == [
        case.is_table(value) for value in values.tolist()
    ]


@pytest.mark.parametrize("writable", [False, True])
async def test_the_disk_shows_valid_entries_only(case: Case, *, writable: bool) -> None:
    """A reader shows the rest of a cluster that the file cuts short; a writer does not."""
    file = PosixFile.open(case.path, writable=writable)
    try:
        layer = QedLayer(file, await read_header(file), make_store(1 << 20))
        await layer.scan_l1()
        bad = set()
        size = case.header.cluster_size
        clusters = case.clusters()
        for number in clusters:
            start = number * size
            length = min(size, case.header.image_size - start)
            extents = await layer.lookup(start, length)
            if extents[0].kind is Kind.BAD:
                bad.add(number)
        assert bad == case.bad_clusters(whole=writable) & set(clusters)
    finally:
        file.close()


async def test_the_check_reports_each_invalid_entry(case: Case) -> None:
    """The number of errors of tables is the number of invalid entries."""
    file = PosixFile.open(case.path)
    try:
        report = await check_image(file, await read_header(file))
    finally:
        file.close()
    others = {Code.DUPLICATE_CLUSTER}
    errors = sum(
        count
        for code, count in report.counts.items()
        if code.severity is Severity.ERROR and code not in others
    )
    bad = [
        value
        for table in case.l2.values()
        for value in table.values()
        if value > ZERO and not case.is_cluster(value)
    ]
    assert errors == len(case.bad_l1) + len(bad)


@needs_extensions
async def test_the_fast_check_vouches_only_for_what_the_check_finds_sound(case: Case) -> None:
    """The fast check answers as the check does, or not at all; it does for a sound image."""
    file = PosixFile.open(case.path)
    try:
        report = await check_image(file, await read_header(file))
    finally:
        file.close()
    found = fast_check(case.path)
    sound = not (report.errors or report.leaks or case.size % case.header.cluster_size)
    assert (found is not None) == sound
    assert found is None or found[2] == report


def test_info_sees_the_invalid_l1_entries(case: Case) -> None:
    """The problem of invalid L1 entries is there if there are any, with their number."""
    qed = describe(case.path).qed
    assert qed is not None
    wild = [problem.message for problem in qed.problems if problem.code == "l1-wild"]
    count = len(case.bad_l1)
    assert bool(wild) == bool(count)
    assert all(f"found {count} entries" in message for message in wild)


@needs_extensions
async def test_the_map_and_the_fast_map_stop_at_the_same_entries(case: Case) -> None:
    """The map marks the clusters that a reader may not show; the fast map ends before them."""
    size = case.header.cluster_size
    bad = set()
    for entry in await map_image(case.path):
        if entry.bad:
            bad |= set(range(entry.start // size, -(-(entry.start + entry.length) // size)))
    assert bad == case.bad_clusters(whole=False)
    with open_fast_map(case.path) as fast:
        if fast is None:
            assert case.bad_l1 or any(v < case.header.l1_end for v in case.l1.values())
            return
        assert not case.bad_l1
        list(fast.lines(as_json=True, name=""))
        # Data between the header and the L1 table is left to the map as well.
        entries, limit = case.header.geometry.entries, case.header.l1_end
        unclear = {
            l1_index * entries + index
            for l1_index, table in case.l2.items()
            for index, value in table.items()
            if ZERO < value < limit
        }
        doubts = case.bad_clusters() | unclear
        if doubts:
            assert fast.reached <= min(doubts) * size
        else:
            assert fast.reached == case.header.image_size


async def test_the_dump_names_what_is_invalid(case: Case) -> None:
    """Every entry is ``ok`` or ``zeros`` if it is valid, and else has another verdict."""
    async with open_dump(case.path) as dump:
        verdicts = {}
        async for item in dump.l1():
            for index in range(item.index, item.index + item.count):
                verdicts[index] = item.verdict
        used = {index for index, value in case.l1.items() if value}
        assert set(verdicts) == used
        assert {index for index, word in verdicts.items() if word != "ok"} == case.bad_l1
        for l1_index, table in case.l2.items():
            wrong = set()
            async for item in dump.l2(l1_index):
                if item.verdict not in {"ok", "zeros"}:
                    wrong |= set(range(item.index, item.index + item.count))
            bad = {i for i, v in table.items() if v > ZERO and not case.is_cluster(v)}
            assert wrong == bad
