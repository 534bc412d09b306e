"""What a check may cost: memory in proportion to content, and checkpoints for other tasks."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import trio

from qedfuse.check.checker import check_image
from qedfuse.check.repair import plan_repair, repair_image
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE
from qedfuse.ondisk.header import Header, build_header
from tests.support.disks import build_image, header_of, l2_entry_offset, put_entry
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from pathlib import Path

LARGEST: Final = Header(1 << 26, 16, 1, 0, 0, 0, 1 << 26, 1 << 62)
"""A geometry with tables of 1 GiB."""
SMALLEST: Final = Header(1 << 12, 16, 1, 0, 0, 0, 1 << 12, 1 << 30)
WIDE_HEADER: Final = Header(1 << 12, 16, 1 << 31, 0, 0, 0, 1 << 43, 1 << 30)

PROGRAM: Final = """
import resource, sys, trio
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.check.checker import check_image
from qedfuse.hostio.imagefile import read_header
from qedfuse.errors import NeedsCheckError
from qedfuse.hostio.posixfile import PosixFile

async def main():
    file = PosixFile.open(sys.argv[1])
    header = await read_header(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = await check_image(file, header)
        print("errors", found.errors)
    except NeedsCheckError as error:
        print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

trio.run(main)
"""


def write_sparse(path: Path, header: Header, size: int, l1_table: bytes) -> None:
    """Make a sparse image file of ``size`` bytes with the start of an L1 table."""
    with path.open("wb") as file:
        file.write(build_header(header))
        file.seek(header.l1_table_offset)
        file.write(l1_table)
        file.truncate(size)


def numbers(*values: int) -> bytes:
    """Encode table entries."""
    return b"".join(value.to_bytes(8, "little") for value in values)


@pytest.mark.parametrize(
    ("header", "size", "l1_table", "answer", "limit"),
    [
        # 2 MiB of entries, all for the same table of 1 GiB: the others overlap it.
        (LARGEST, 8 << 30, numbers(4 << 30) * (1 << 18), "errors 262143", 40 << 10),
        # As many tables, each a hole of its own, in a file of 4 TiB.
        (LARGEST, 4 << 40, numbers(*range(4 << 30, 1 << 42, 1 << 30)), "errors 0", 40 << 10),
        # The most clusters that a file can have on ext4, and more than there is a map for.
        (SMALLEST, (1 << 44) - 4096, numbers(1 << 30), "errors 0", 20 << 10),
        # A header that reserves 8 TiB.
        (WIDE_HEADER, (1 << 44) - 4096, numbers(0), "too large to check", 20 << 10),
    ],
    ids=["equal", "holes", "long", "wide-header"],
)
def test_memory_is_bounded_by_real_content(
    header: Header, size: int, l1_table: bytes, answer: str, limit: int, tmp_path: Path
) -> None:
    """A check adds at most ``limit`` KiB to the process for a small file that claims terabytes."""
    path = tmp_path / "hostile.qed"
    try:
        write_sparse(path, header, size, l1_table)
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} has no files of {size} bytes: {error}")
    command = (sys.executable, "-c", PROGRAM, str(path))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, used = done.stdout.splitlines()
    assert answer in first
    assert int(used) < limit


async def test_other_tasks_run_during_a_check(tmp_path: Path) -> None:
    """A check of many tables lets other tasks run at least once for each table."""
    header = Header(DEFAULT_CLUSTER_SIZE, 1, 1, 0, 0, 0, DEFAULT_CLUSTER_SIZE, 1 << 38)
    tables = 100
    first = header.l1_end
    path = tmp_path / "many.qed"
    table_bytes = header.geometry.table_bytes
    offsets = range(first, first + tables * table_bytes, table_bytes)
    write_sparse(path, header, first + tables * table_bytes, numbers(*offsets))
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(numbers(1))
    checkpoints = 0

    async def other() -> None:
        nonlocal checkpoints
        while True:
            await trio.lowlevel.checkpoint()
            checkpoints += 1

    handle = PosixFile.open(str(path))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            found = await check_image(handle, header)
            nursery.cancel_scope.cancel()
    finally:
        handle.close()
    assert not found.errors
    assert checkpoints >= tables


@pytest.mark.parametrize("clusters", [4001, 1 << 50], ids=["map", "sorted"])
def test_free_runs_are_joined(clusters: int) -> None:
    """Runs of clusters without an owner are joined across the segments that are searched."""
    references = OwnerBitmap(clusters, "image")
    assert references.free_runs(1000, 3) == [(0, 1000)]
    references.claim_range(0, 100)
    references.claim(np.array([103, 200, 199, 3000], np.uint64))
    assert references.free_runs(4000, 9) == [
        (100, 3), (104, 95), (201, 2799), (3001, 999),
    ]  # fmt: skip
    assert references.free_runs(4000, 2) == [(100, 3), (104, 95)]
    assert references.free_runs(150, 9) == [(100, 3), (104, 46)]


def test_overlapping_claims_count_each_cluster_once() -> None:
    """Ranges and single clusters that overlap at any bit count each cluster once."""
    chance = random.Random(2)
    for _ in range(200):
        size = chance.randrange(1, 100)
        references, owned = OwnerBitmap(size, "image"), set[int]()
        for _ in range(4):
            first, last = sorted(chance.choices(range(size + 1), k=2))
            references.claim_range(first, last)
            owned.update(range(first, last))
            single = [chance.randrange(size) for _ in range(5)]
            taken = references.claim(np.array(single, np.uint64)).tolist()
            for index, cluster in enumerate(single):
                assert taken[index] == (cluster in owned)
                owned.add(cluster)
        assert references.count == len(owned)
        free = [
            n
            for first, count in references.free_runs(size, size)
            for n in range(first, first + count)
        ]
        assert free == sorted(set(range(size)) - owned)


@pytest.mark.parametrize("backing", [b"", b"base"])
@pytest.mark.parametrize("value", [(1 << 63) - 4096, 1 << 63, (1 << 63) - 1, (1 << 64) - 4096])
async def test_entries_near_the_largest_offset(value: int, backing: bytes) -> None:
    """Entries near 2^63 and 2^64 are found and cleared like any other entry out of the file."""
    content = build_image(1 << 22, {0: b"a", 1: b"b", 600: b"c"}, backing=backing)
    put_entry(content, l2_entry_offset(content, 1), value)
    put_entry(content, header_of(content).l1_table_offset + 8, value)
    file = MemoryFile(content)
    header = await read_header(file)
    assert (await check_image(file, header)).errors == 2
    plan = await plan_repair(file, header)
    report = await repair_image(file, header)
    assert (report.cleared, report.lost, report.after.errors) == (2, plan.lost, 0)
