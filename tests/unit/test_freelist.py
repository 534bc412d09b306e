"""The persistent free list as bytes: it reads back, and every defect is detected."""

from __future__ import annotations

import functools
import random
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.disk.state import freelistreader
from qedfuse.disk.state.freelistreader import read_list
from qedfuse.disk.state.freelistruns import expand_runs
from qedfuse.disk.state.freelistwriter import write_list
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.imagefile import read_header
from qedfuse.ondisk.freelist import (
    DESCRIPTOR_OFFSET,
    BadListError,
    Descriptor,
    build_cluster,
    build_descriptor,
    parse_cluster_header,
    parse_descriptor,
    parse_runs,
    runs_in_cluster,
)
from qedfuse.ondisk.header import Header, build_header
from tests.support.disks import build_image, header_of, pattern
from tests.support.freelists import (
    DESCRIPTOR,
    leaked_runs,
    listed,
    put_cluster,
    put_descriptor,
    put_list,
    set_bit,
)
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CLUSTER: Final = 4096
SIZE: Final = 4 << 20


def image(
    free: int = 40, *, table_size: int = 1, header_size: int = 1, backing: bytes = b""
) -> bytearray:
    """Return an image in which ``free`` clusters are free, none of them adjacent."""
    build = functools.partial(
        build_image, SIZE, table_size=table_size, header_size=header_size, backing=backing
    )
    clusters: dict[int, bytes | int] = {n: pattern(CLUSTER, n) for n in range(3)}
    numbers = range(100, 101 + free)
    first = len(build({**clusters, **dict.fromkeys(numbers, 0)}))
    entries = {n: first + 2 * (n - 100) * CLUSTER for n in numbers}
    content = build({**clusters, **entries})
    content.extend(bytes((2 * free + 1) * CLUSTER))
    assert len(leaked_runs(content)) == free
    return content


def array(runs: list[tuple[int, int]]) -> NDArray[np.uint64]:
    """Return runs as the code under test wants them."""
    return np.array(runs, np.uint64).reshape(-1, 2)


async def read(content: bytes | bytearray, tables: list[int] | None = None) -> list[list[int]]:
    """Read the list of an image in memory."""
    file = MemoryFile(content, writable=False)
    if tables is None:
        header = header_of(content)
        raw = content[header.l1_table_offset : header.l1_end]
        tables = sorted(value for (value,) in struct.iter_unpack("<Q", raw) if value)
    found = await read_list(file, await read_header(file), np.array(tables, np.uint64))
    assert found.clusters == sum(count for _, count in found.runs.tolist())
    return [list(run) for run in found.runs.tolist()]


async def refused(content: bytes | bytearray, tables: list[int] | None = None) -> str:
    """Return the message with which a list is refused."""
    with pytest.raises(CorruptImageError) as caught:
        await read(content, tables)
    message = str(caught.value)
    assert message.startswith("image: free list: ")
    assert ": found " in message
    assert ", expected " in message
    assert "\n" not in message
    return message


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=5, max_size=5), st.integers(0, 99))
def test_a_descriptor_reads_back(fields: list[int], crc: int) -> None:
    """A descriptor that is built parses to the same values."""
    first, clusters, runs, free, length = fields
    descriptor = Descriptor(first, clusters, runs, free, length, crc)
    data = build_descriptor(descriptor)
    assert len(data) == 512
    assert parse_descriptor(data) == descriptor


@given(
    st.integers(0, (1 << 64) - 1),
    st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 2), min_size=1, max_size=254),
)
def test_a_list_cluster_reads_back(behind: int, runs: list[tuple[int, int]]) -> None:
    """A list cluster that is built parses to the same runs, and ends with a sector."""
    data = build_cluster(behind, array(runs))
    assert len(data) % 512 == 0
    cluster = parse_cluster_header(data, CLUSTER)
    assert (cluster.next_cluster, cluster.runs) == (behind, len(runs))
    assert (parse_runs(cluster, data) == array(runs)).all()


def test_the_smallest_cluster_holds_254_runs() -> None:
    """A cluster of 4 KiB holds a header of 32 bytes and 254 runs of 16."""
    assert runs_in_cluster(4096) == 254
    with pytest.raises(BadListError, match="found 254, expected 1 to 253"):
        parse_cluster_header(build_cluster(0, array([(9, 1)] * 254)), 4095)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=30))
def test_expand_runs(gaps: list[tuple[int, int]]) -> None:
    """Expanding runs gives each cluster once, in order."""
    runs: list[tuple[int, int]] = []
    expected: list[int] = []
    at = 7
    for gap, count in gaps:
        at += gap
        runs.append((at, count))
        expected += range(at, at + count)
        at += count
    assert expand_runs(array(runs)).tolist() == expected


@pytest.mark.parametrize("free", [1, 2, 254, 255, 600])
async def test_what_is_written_is_what_is_read(free: int) -> None:
    """A written list, also of several list clusters, reads back by two independent readers."""
    content = image(free)
    runs = leaked_runs(content)
    file = MemoryFile(content)
    await write_list(file, await read_header(file), array(runs))
    assert len(file.content) == len(content)
    assert listed(file.content) is None
    set_bit(file.content)
    assert listed(file.content) == runs
    assert await read(file.content) == [list(run) for run in runs]


@pytest.mark.parametrize("free", [1, 300])
async def test_what_the_tests_build_is_what_is_read(free: int) -> None:
    """A list built by the tests reads back by the code under test."""
    content = image(free)
    put_list(content)
    assert await read(content) == [list(run) for run in leaked_runs(content)]


async def test_each_changed_byte_is_noticed_or_changes_nothing() -> None:
    """Any changed byte of descriptor or list is detected or does not change the result."""
    content = image(300)
    put_list(content)
    good = await read(content)
    places = [first for first, _ in leaked_runs(content)][:2]
    ends = [DESCRIPTOR + 512, places[0] * CLUSTER + CLUSTER, places[1] * CLUSTER + CLUSTER]
    chance = random.Random(1)
    harmless = 0
    for end, length in zip(ends, (512, CLUSTER, CLUSTER), strict=True):
        for at in range(end - length, end, 1 if length == 512 else 7):
            before = content[at]
            content[at] ^= 1 << chance.randrange(8)
            try:
                assert await read(content) == good
                harmless += 1
                assert at >= places[1] * CLUSTER + 32 + 46 * 16, at
            except CorruptImageError:
                pass
            content[at] = before
    # What lies behind the last run has no meaning.
    assert harmless == len(range(ends[2] - CLUSTER, ends[2], 7)) - len(range(0, 32 + 46 * 16, 7))


BAD_FIELDS: Final = [
    ({"version": 2}, "descriptor version: found 2, expected 1"),
    ({"list_crc": 5}, "runs: found a wrong checksum"),
    ({"first_cluster": 0}, "list cluster offset: found 0"),
    ({"first_cluster": 4097}, "list cluster offset: found 4097"),
    ({"first_cluster": 1 << 63}, "list cluster offset: found 9223372036854775808"),
    ({"first_cluster": 8192}, "list cluster magic"),
    ({"list_clusters": 0}, "list_clusters: found 0, expected 1 to 40"),
    ({"list_clusters": 2}, "list cluster offset: found 0"),
    ({"list_clusters": (1 << 64) - 1}, "list_clusters: found 18446744073709551615"),
    ({"runs": 0}, "runs: found 0"),
    ({"runs": 39}, "runs in a list cluster: found 40, expected at most 39"),
    ({"runs": 41, "free_clusters": 41}, "list: found 40 runs"),
    ({"runs": 1 << 63}, "descriptor runs: found 9223372036854775808"),
    ({"free_clusters": 41}, "runs: found 40 clusters, expected 41"),
    ({"free_clusters": 39}, "free_clusters: found 39"),
    ({"free_clusters": 1 << 40}, "free_clusters: found 1099511627776"),
    ({"file_bytes": 4096}, "file_bytes: found 4096"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
async def test_bad_descriptors(fields: dict[str, int], message: str) -> None:
    """Each descriptor field out of range is refused, although all checksums are right."""
    content = image()
    put_list(content, **fields)
    assert message in await refused(content)


async def test_bad_runs() -> None:
    """Runs that are unordered, overlapping or outside are refused, although checksums are right."""
    content = image()
    good = leaked_runs(content)
    clusters = len(content) // CLUSTER
    top = (1 << 64) - 1
    inside = (
        f"expected at least one cluster, not before cluster 1, and without cluster {clusters - 1}"
    )
    cases: list[tuple[list[tuple[int, int]], str]] = [
        ([*good[1::-1], *good[2:]], "runs that ascend"),
        ([good[0], *good], "runs that ascend"),
        ([(good[0][0], 1), (good[0][0] + 1, 1)], "runs that ascend and do not touch"),
        ([*good, (clusters - 1, 1)], "the file's last"),
        ([*good, (clusters, 1)], "the file's last"),
        ([*good, (clusters - 1, 2)], "the file's last"),
        ([*good, (good[-1][0] + 1, top)], "the file's last"),
        ([*good, (top, 2)], "the file's last"),
        ([(0, 1), *good], f"found 1 clusters from cluster 0 on, {inside}"),
        (
            [*good[:-1], (good[-1][0], 0)],
            f"found 0 clusters from cluster {good[-1][0]} on, {inside}",
        ),
        ([(1, 1), *good], "found the L1 table at 4096 among the free clusters"),
        ([(2, 1), *good], "found an L2 table at 8192 among the free clusters"),
    ]
    for runs, message in cases:
        bad = bytearray(content)
        total = sum(count for _, count in runs) % (1 << 64)
        free = min(max(total, len(runs)), clusters)
        put_list(bad, runs, [good[0][0]], free_clusters=free)
        assert message in await refused(bad), runs


async def test_a_table_of_several_clusters_lies_in_no_run() -> None:
    """A run that contains any cluster of a table is refused."""
    content = image(table_size=4)
    good = leaked_runs(content)
    header = header_of(content)
    for cluster in range(1, 9):
        bad = bytearray(content)
        put_list(bad, [(cluster, 1), *good], [good[0][0]])
        assert "table at" in await refused(bad)
    table = header.l1_end // CLUSTER
    put_list(content, [(table + 4, 1), *good], [good[0][0]])
    assert await read(content, [table * CLUSTER])
    assert "L2 table" in await refused(content, [(table + 1) * CLUSTER])
    assert "L2 table" in await refused(content, [(table + 4) * CLUSTER, (table + 90) * CLUSTER])


async def test_the_list_lies_in_free_clusters() -> None:
    """A list that lies in clusters that it does not name as free is refused."""
    content = image()
    used = leaked_runs(content)[0][0] - 1
    put_list(content, None, [used])
    assert f"found the cluster at {used * CLUSTER}, not listed as free" in await refused(content)


async def test_a_chain_without_an_end() -> None:
    """A loop of list clusters is refused at its first step back."""
    content = image()
    runs = leaked_runs(content)
    first, second = (run[0] * CLUSTER for run in runs[:2])
    body = struct.pack("<QQ", *runs[0])
    for behind in (first, second - CLUSTER):
        put_list(content, runs[:3], [run[0] for run in runs[:3]], list_clusters=3)
        put_cluster(content, first, second, body)
        put_cluster(content, second, behind, body)
        assert "list cluster offset: found" in await refused(content)


async def test_images_that_have_no_list() -> None:
    """NEED_CHECK, a backing name over the descriptor, and no descriptor refuse the list."""
    content = image()
    put_list(content)
    content[16] |= 2
    assert "NEED_CHECK" in await refused(content)

    content = image(header_size=2, backing=b"x" * 500)
    put_list(content)
    assert await read(content)
    struct.pack_into("<I", content, 56, DESCRIPTOR - 499)
    assert "the backing file name in its bytes" in await refused(content)
    struct.pack_into("<I", content, 56, DESCRIPTOR - 500)
    assert await read(content)
    struct.pack_into("<I", content, 56, DESCRIPTOR + 511)
    assert "the backing file name in its bytes" in await refused(content)

    content = image()
    set_bit(content)
    assert "descriptor magic: found 0000000000000000" in await refused(content)


async def test_too_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list with more runs than the limit is refused."""
    content = image(3)
    put_list(content)
    monkeypatch.setattr(freelistreader, "MAX_RUNS", 2)
    assert "descriptor runs: found 3, expected 1 to 2" in await refused(content)


HOSTILE: Final = """
import resource, sys, trio
import numpy as np
from qedfuse.hostio.imagefile import read_header
from qedfuse.disk.state.freelistreader import read_list
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.posixfile import PosixFile

async def main():
    file = PosixFile.open(sys.argv[1])
    header = await read_header(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        await read_list(file, header, np.empty(0, np.uint64))
    except CorruptImageError as error:
        print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

trio.run(main)
"""


def test_hostile_counts_cost_nothing(tmp_path: Path) -> None:
    """A sparse file that claims the maximum of runs is refused with little memory."""
    header = Header(1 << 26, 16, 1, 1 << 60, 0, 0, 1 << 26, 1 << 40)
    length = 1 << 42
    content = bytearray(4096)
    content[:64] = build_header(header)
    put_descriptor(content, 1, 0, 1 << 40, 1, 1 << 20, 1 << 20, length)
    # The descriptor wants to be consistent: no more free clusters than there are.
    put_descriptor(content, 1, 0, 1 << 40, 1, 65000, 65000, length)
    path = tmp_path / "hostile.qed"
    with path.open("wb") as file:
        file.write(content)
        file.seek(1 << 40)
        file.write(struct.pack("<8sQII8x", b"QEDFRUNS", 0, 65000, 7))
        file.truncate(length)
    command = [sys.executable, "-c", HOSTILE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    assert "free list: list cluster checksum: found 0x00000007" in message
    assert int(grown) < 16 << 10


@given(st.integers(0, 1 << 32))
def test_random_lists_are_read_or_refused_in_one_line(seed: int) -> None:
    """Random fields and runs with right checksums are read, or refused in one line."""
    chance = random.Random(seed)
    content = image(6)
    good = leaked_runs(content)
    numbers = [0, 1, 2, len(content) // CLUSTER, 1 << 32, 1 << 63, (1 << 64) - 1]
    runs = [
        (chance.choice([first, *numbers]) if chance.random() < 0.1 else first,
         chance.choice([count, *numbers]) if chance.random() < 0.1 else count)
        for first, count in good
    ]  # fmt: skip
    names = ["first_cluster", "list_clusters", "runs", "free_clusters", "file_bytes"]
    fields = {chance.choice(names): chance.choice(numbers)} if chance.random() < 0.5 else {}
    total = sum(count for _, count in runs) % (1 << 64)
    put_list(content, runs, [good[0][0]], **{"free_clusters": total, **fields})

    async def judge() -> str:
        try:
            assert await read(content) == [list(run) for run in runs]
        except CorruptImageError as error:
            return str(error)
        return ""

    message = trio.run(judge)
    assert "\n" not in message
    assert not message or fields or runs != good


def test_the_descriptor_is_in_the_smallest_cluster() -> None:
    """The descriptor is the last sector of the first 4 KiB."""
    assert DESCRIPTOR_OFFSET == DESCRIPTOR == 4096 - 512
