"""The check of an image with a persistent free list: what it reports, what it accepts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.check.checker import check_image
from qedfuse.check.findings import Code
from qedfuse.check.inspector import inspect_image as inspector
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.tools.repair.imagecheck import check, plan, repair
from tests.support.disks import build_image, header_of, l2_entry_offset, pattern, put_entry
from tests.support.freelists import listed, put_list
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER_BYTES: Final = 4096
DISK_BYTES: Final = 100 * CLUSTER_BYTES


def image() -> bytearray:
    """Build an image with four free clusters and a list of them."""
    content = build_image(DISK_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(6)})
    for number in range(1, 5):
        put_entry(content, l2_entry_offset(content, number), 0)
    put_list(content)
    return content


async def test_a_list_is_counted_and_a_contradicted_one_is_dropped(tmp_path: Path) -> None:
    """Listed clusters are no leaks; a contradicted list is an error that a repair removes."""
    path = tmp_path / "image.qed"
    content = image()
    path.write_bytes(content)
    report = (await check(str(path))).after
    assert (report.counts, report.listed_clusters) == ({}, 4)

    put_entry(content, l2_entry_offset(content, 9), 4 * CLUSTER_BYTES)
    path.write_bytes(content)
    report = (await check(str(path))).after
    assert set(report.counts) == {Code.FREE_LIST_CONTRADICTED}
    expected = "found 16384, expected a cluster that is not in the free list"
    assert expected in report.findings[0].message

    planned = await plan(str(path), "all")
    assert path.read_bytes() == content
    result = await repair(str(path), "all")
    assert planned.plan == result.plan
    assert result.plan.end == len(content)
    assert result.backup is not None, "the header was changed"
    assert listed(path.read_bytes()) is None
    assert result.after.counts == {Code.LEAKED_CLUSTERS: 3}
    assert result.after.listed_clusters is None
    assert (await check(str(path))).after == result.after


@pytest.mark.expect_log("leaked clusters found by the check: 4; no errors in the tables")
async def test_a_bad_list_alone_does_not_refuse_an_image() -> None:
    """A bad list beside NEED_CHECK refuses no image, because the disk drops it; bad tables do."""
    content = image()
    content[16] |= 2
    file = MemoryFile(content)
    await inspector(file, await read_header(file))

    put_entry(content, l2_entry_offset(content, 9), 1 << 40)
    file = MemoryFile(content)
    with pytest.raises(CorruptImageError, match=r"found 1 error \(first: image: L1 entry 0: L2"):
        await inspector(file, await read_header(file))


async def test_more_listed_clusters_than_fit_in_a_map(tmp_path: Path) -> None:
    """Listed clusters of a sparse file that is too long for a map are counted, not marked."""
    content = build_image(DISK_BYTES, {0: pattern(CLUSTER_BYTES, 0)})
    first, length = len(content) // CLUSTER_BYTES, (1 << 44) - CLUSTER_BYTES
    put_entry(content, l2_entry_offset(content, 1), length - CLUSTER_BYTES)
    content.extend(bytes(CLUSTER_BYTES))
    put_list(content, [(first, 1 << 28)], [first], file_bytes=length)
    path = tmp_path / "sparse.qed"
    path.write_bytes(content)
    os.truncate(path, length)
    file = PosixFile.open(str(path))
    try:
        found = await check_image(file, await read_header(file))
    finally:
        file.close()
    assert found.errors == 0
    assert found.listed_clusters == 1 << 28
    assert found.leaks == length // CLUSTER_BYTES - first - (1 << 28) - 1
    assert set(found.counts) == {Code.LEAKED_CLUSTERS, Code.MOSTLY_LEAKED}
    assert header_of(content).has_free_list


async def test_the_first_leak_in_a_file_too_long_for_a_map_has_no_place(tmp_path: Path) -> None:
    """Clusters of a list that are only counted are not named as leaked, and are counted once."""
    content = build_image(DISK_BYTES, {0: pattern(CLUSTER_BYTES, 0)})
    first, length = len(content) // CLUSTER_BYTES, (1 << 44) - CLUSTER_BYTES
    for number, cluster in enumerate((first + 5, first + 5, first + 6), 2):
        put_entry(content, l2_entry_offset(content, number), cluster * CLUSTER_BYTES)
    put_entry(content, l2_entry_offset(content, 1), length - CLUSTER_BYTES)
    content.extend(bytes(CLUSTER_BYTES))
    put_list(content, [(first, 1 << 28)], [first], file_bytes=length)
    path = tmp_path / "sparse.qed"
    path.write_bytes(content)
    os.truncate(path, length)
    found = (await check(str(path))).after
    assert found.counts[Code.FREE_LIST_CONTRADICTED] == 3
    assert found.leaks == length // CLUSTER_BYTES - first - (1 << 28) - 1
    leak = next(item for item in found.findings if item.code is Code.LEAKED_CLUSTERS)
    assert leak.message.endswith("that nothing refers to, expected none")
    assert leak.file_offset is None
