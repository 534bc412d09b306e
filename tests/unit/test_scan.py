"""The scan after opening finds all unreferenced clusters, also beside changes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.disk.space.scan import Scan
from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ZERO
from tests.support.disks import (
    UNCOMPACTED,
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
from tests.support.hostfiles import FailingFile, MemoryFile, Punch, RecordingFile

if TYPE_CHECKING:
    import os

CLUSTER: Final = 4096
SIZE: Final = 64 * CLUSTER
SPAN: Final = 512
"""Clusters of the disk that one table describes."""


def leaky(*lost: int, count: int = 10, tail: int = 0) -> bytearray:
    """Return an image in which some clusters have lost their reference."""
    image = build_image(SIZE, {at: pattern(CLUSTER, at) for at in range(count)})
    for at in lost:
        put_entry(image, l2_entry_offset(image, at), 0)
    return image + bytes([7]) * tail * CLUSTER


async def test_leaks_are_free_space() -> None:
    """Leaked clusters are used before the file grows, and a close cuts or punches the rest."""
    file = MemoryFile(leaky(2, 3, 5, 7))
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.ensure_scanned()
        assert disk.statistics().free_clusters == 4
        end = disk.statistics().file_bytes
        await disk.write(20 * CLUSTER, pattern(3 * CLUSTER, 50))
        assert disk.statistics().file_bytes == end
    found = inspect_image(file.content)
    assert found.errors == ()
    assert len(found.leaked) == 1
    assert not any(file.content[found.leaked[0] : found.leaked[0] + CLUSTER])


async def test_leaks_at_the_end_are_cut_off() -> None:
    """Leaked clusters at the end are cut off without any other change."""
    file = MemoryFile(leaky(8, 9, tail=5))
    async with opened(file) as disk:
        await disk.ensure_scanned()
    assert inspect_image(file.content).leaks == 0
    assert len(file.content) == len(leaky()) - 2 * CLUSTER


async def test_a_clean_image_without_leaks_is_left_alone() -> None:
    """Opening and closing an image without leaks writes nothing."""
    file = RecordingFile(leaky())
    async with opened(file) as disk:
        await disk.ensure_scanned()
    assert file.changes == []


async def test_autoclear_bits_go_before_leaks_are_given_back() -> None:
    """Autoclear bits are cleared before leaks are cut off."""
    image = build_image(SIZE, {0: b"a"}, autoclear=5) + bytes(3 * CLUSTER)
    file = RecordingFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
    assert header_of(file.content).autoclear_features == 0
    assert inspect_image(file.content).leaks == 0


async def test_tables_past_the_end_of_the_disk_are_in_use() -> None:
    """Tables past the end of the disk are in use, and a resize uses them."""
    image = build_image(512 * CLUSTER * 3, dict.fromkeys((0, 600, 1100), b"x"))
    file = MemoryFile(image[:48] + (CLUSTER * 512).to_bytes(8, "little") + image[56:])
    async with opened(file) as disk:
        await disk.ensure_scanned()
        assert disk.statistics().free_clusters == 0


@pytest.mark.parametrize("read_first", [False, True])
async def test_changes_while_the_scan_is_under_way(*, read_first: bool) -> None:
    """Clusters written or dropped during the scan are neither lost nor allocated twice.

    The changes are made to a table that the scan has read already, or is going to read.
    """
    other = 0 if read_first else SPAN
    numbers = [*range(30), *range(SPAN, SPAN + 30)]
    image = build_image(2 * SPAN * CLUSTER, {at: pattern(CLUSTER, at) for at in numbers})
    for at in (3, 4):
        put_entry(image, l2_entry_offset(image, at), 0)
    inner = MemoryFile(image)
    file = FailingFile(inner)
    expected = bytearray(guest_bytes(inner.content))
    with file.hold("read", nth=4 if read_first else 3) as held:
        async with opened(file) as disk:
            await held.reached.wait()
            for at in (other + 1, other + 2, other + 9, other + 29):
                await disk.discard(at * CLUSTER, CLUSTER)
                expected[at * CLUSTER : (at + 1) * CLUSTER] = bytes(CLUSTER)
            start = (other + 40) * CLUSTER
            await disk.write(start, pattern(4 * CLUSTER, 77))
            expected[start : start + 4 * CLUSTER] = pattern(4 * CLUSTER, 77)
            await disk.flush()
            assert disk.statistics().free_clusters is None
            held.release()
            await disk.ensure_scanned()
            assert disk.statistics().free_clusters == 2
            await disk.flush()
            assert disk.statistics().free_clusters == 6
            start = 50 * CLUSTER
            await disk.write(start, pattern(6 * CLUSTER, 78))
            expected[start : start + 6 * CLUSTER] = pattern(6 * CLUSTER, 78)
            assert difference(await disk.read(0, disk.size), expected) is None
    found = inspect_image(inner.content)
    assert (found.errors, found.leaks) == ((), 0)
    assert difference(guest_bytes(inner.content), expected) is None


@pytest.mark.expect_log("found 1 references to clusters that have another owner")
@pytest.mark.parametrize("read_first", [False, True])
async def test_one_of_two_owners_drops_a_cluster_during_the_scan(*, read_first: bool) -> None:
    """A cluster that one of two owners drops during the scan stays with the other."""
    image = build_image(2 * SPAN * CLUSTER, {at: pattern(CLUSTER, at) for at in (1, 2, SPAN)})
    shared = get_entry(image, l2_entry_offset(image, 2))
    put_entry(image, l2_entry_offset(image, SPAN + 2), shared)
    gives_up, keeps = (2, SPAN + 2) if read_first else (SPAN + 2, 2)
    inner = MemoryFile(image)
    file = FailingFile(inner)
    with file.hold("read", nth=4 if read_first else 3) as held:
        async with opened(file) as disk:
            await held.reached.wait()
            await disk.discard(gives_up * CLUSTER, CLUSTER)
            await disk.flush()
            held.release()
            await disk.ensure_scanned()
            await disk.flush()
            await disk.write(20 * CLUSTER, pattern(5 * CLUSTER, 5))
            assert await disk.read(keeps * CLUSTER, CLUSTER) == pattern(CLUSTER, 2)
    assert guest_bytes(inner.content)[keeps * CLUSTER :][:CLUSTER] == pattern(CLUSTER, 2)


@pytest.mark.expect_log("found 1 references to clusters that have another owner")
async def test_an_owner_in_an_unread_table_drops_a_seen_cluster() -> None:
    """A cluster that the scan saw with one owner stays when another one drops it."""
    tables = {at: pattern(CLUSTER, at) for at in (2, SPAN, 2 * SPAN)}
    image = build_image(3 * SPAN * CLUSTER, tables)
    shared = get_entry(image, l2_entry_offset(image, 2))
    put_entry(image, l2_entry_offset(image, 2 * SPAN), shared)
    file = FailingFile(MemoryFile(image))
    with file.hold("read", nth=4) as held:
        async with opened(file) as disk:
            await held.reached.wait()  # the first table has been walked
            await disk.discard(2 * SPAN * CLUSTER, CLUSTER)
            held.release()
            await disk.ensure_scanned()
            await disk.flush()
            await disk.write(20 * CLUSTER, pattern(5 * CLUSTER, 5))
            assert await disk.read(2 * CLUSTER, CLUSTER) == pattern(CLUSTER, 2)


@pytest.mark.expect_log("references to clusters that have another owner")
async def test_both_owners_drop_a_cluster_before_the_scan_reads_them() -> None:
    """A cluster that two owners dropped before the scan read them is not used again."""
    image = build_image(2 * SPAN * CLUSTER, {at: pattern(CLUSTER, at) for at in (1, 2, SPAN)})
    shared = get_entry(image, l2_entry_offset(image, SPAN))
    put_entry(image, l2_entry_offset(image, SPAN + 2), shared)
    file = FailingFile(MemoryFile(image))
    with file.hold("read", nth=3) as held:
        async with opened(file) as disk:
            await held.reached.wait()
            await disk.discard(SPAN * CLUSTER, 3 * CLUSTER)
            held.release()
            await disk.ensure_scanned()
            await disk.flush()
            assert disk.statistics().free_clusters == 0


async def test_a_full_file_waits_for_the_scan() -> None:
    """A write waits for the scan where the file would exceed its bound."""
    size = 8 * CLUSTER
    image = build_image(size, dict.fromkeys(range(8), b"x"))
    put_entry(image, l2_entry_offset(image, 3), 0)
    inner = MemoryFile(image)
    file = FailingFile(inner)
    with file.hold("read", nth=3) as held:
        async with opened(file) as disk, trio.open_nursery() as nursery:
            await held.reached.wait()
            nursery.start_soon(disk.write, 3 * CLUSTER, b"again")
            await trio.testing.wait_all_tasks_blocked()
            assert inner.size() == len(image)
            held.release()
    assert len(inner.content) == len(image)
    assert inspect_image(inner.content).leaks == 0


@pytest.mark.expect_log("found 1 references to clusters that have another owner")
async def test_clusters_with_two_owners_are_not_used_again() -> None:
    """A cluster with two owners is not used again when one of them drops it."""
    image = leaky(count=10)
    put_entry(image, l2_entry_offset(image, 7), get_entry(image, l2_entry_offset(image, 2)))
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.discard(2 * CLUSTER, CLUSTER)
        await disk.flush()
        await disk.write(20 * CLUSTER, pattern(5 * CLUSTER, 5))
        assert await disk.read(7 * CLUSTER, CLUSTER) == pattern(CLUSTER, 2)
    assert guest_bytes(file.content)[7 * CLUSTER : 8 * CLUSTER] == pattern(CLUSTER, 2)
    assert header_of(file.content).need_check, "the image wants a check"


@pytest.mark.expect_log("found invalid table entries")
async def test_a_wild_entry_is_found_by_the_scan() -> None:
    """A bad entry that no request met is found, and NEED_CHECK stays set."""
    image = leaky()
    put_entry(image, l2_entry_offset(image, 30), len(image))
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(20 * CLUSTER, b"x")
    assert header_of(file.content).need_check


@pytest.mark.expect_log("found invalid table entries")
@pytest.mark.parametrize("level", [1, 2])
async def test_what_a_wild_entry_may_have_pointed_to_is_kept(level: int) -> None:
    """In an image with a bad entry no cluster is freed, since repair may find its target."""
    image = leaky(3, tail=2)
    where = l2_entry_offset(image, 5) if level == 2 else header_of(image).l1_table_offset
    put_entry(image, where, get_entry(image, where) ^ 1 << 40)
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        if level == 2:
            await disk.write(20 * CLUSTER, b"x")
            await disk.discard(8 * CLUSTER, CLUSTER)
    kept = {at: item for at, item in enumerate(image) if item != file.content[at]}
    table = l2_entry_offset(leaky(), 0)
    entries = set(range(table, table + CLUSTER))
    assert kept.keys() <= {16} | entries, "only NEED_CHECK and entries were changed"


@pytest.mark.expect_log("read: Input/output error (while looking for free space)")
@pytest.mark.expect_log("NEED_CHECK stays set, because the file has grown")
async def test_a_disk_works_after_a_failed_scan() -> None:
    """After a failed scan the disk works and uses no dropped cluster again."""
    file = FailingFile(MemoryFile(leaky(3)))
    file.fail("read", nth=3)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        assert disk.statistics().free_clusters is None
        end = disk.statistics().file_bytes
        await disk.discard(0, 2 * CLUSTER)
        await disk.flush()
        await disk.write(20 * CLUSTER, b"x")
        assert disk.statistics().file_bytes == end + CLUSTER


@pytest.mark.expect_log("image: stat: Stale file handle (while looking for holes)")
async def test_a_scan_ends_if_the_host_refuses_the_attributes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The free clusters are known, and the host is asked which of them are holes."""
    monkeypatch.setattr("qedfuse.disk.space.scan._MAX_HOLE_QUERIES_CLUSTERS", 3)

    class StaleFile(RecordingFile):
        def stat(self) -> os.stat_result:
            raise HostError.from_os(OSError(errno.ESTALE, ""), "image", "stat")

    file = StaleFile(leaky(2, 3, 5, 7))
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.ensure_scanned()
        statistics = disk.statistics()
        assert statistics.scan is not None
        assert (statistics.scan.state, statistics.free_clusters) == ("complete", 4)
        await disk.flush()
    punched = [change.length for change in file.changes if isinstance(change, Punch)]
    assert punched == [2 * CLUSTER, CLUSTER, CLUSTER]


@pytest.mark.expect_log("too large to check: found more than 7 references")
@pytest.mark.parametrize("length", [8, 100])
async def test_a_discard_that_exceeds_the_limit_of_the_scan(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The discard is done, all its clusters are in quarantine, and the scan has no result.

    The discard is processed run by run, or with numpy.
    """
    # Header, L1 table, two L2 tables and the first of three runs of clusters.
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_BITMAP_CLUSTERS", 0)
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_LISTED_CLUSTERS", 7)
    numbers = [0, *range(SPAN, SPAN + 8)]
    image = build_image(2 * SPAN * CLUSTER, {at: pattern(CLUSTER, at) for at in numbers})
    for at in (0, SPAN + 3, SPAN + 5):
        put_entry(image, l2_entry_offset(image, at), ZERO)
    inner = MemoryFile(image)
    file = FailingFile(inner)
    held = file.hold("read", nth=3)
    async with opened(file, options=UNCOMPACTED) as disk:
        with held:
            await held.reached.wait()  # the first table has not been walked
            await disk.discard(SPAN * CLUSTER, length * CLUSTER)
            assert disk.statistics().quarantined_clusters == 6
            await disk.flush()
            assert not any(guest_bytes(inner.content)), "the flush has written the table"
            held.release()
            await disk.ensure_scanned()
            statistics = disk.statistics()
            assert statistics.scan is not None
            assert (statistics.scan.state, statistics.scan.scanned_tables) == ("failed", 2)
            end = statistics.file_bytes
            await disk.write(20 * CLUSTER, b"x")
            assert disk.statistics().file_bytes == end + CLUSTER
    assert inspect_image(inner.content).errors == ()


async def test_closing_waits_for_the_scan_only_if_it_needs_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A close waits for the scan if there are clusters to free, or if the file has grown."""
    runs = 0
    walk = Scan._walk

    async def blocked(self: Scan) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            await trio.sleep_forever()
        await walk(self)

    monkeypatch.setattr(Scan, "_walk", blocked)
    file = MemoryFile(leaky(3))
    async with opened(file) as disk:
        await disk.write(0, b"in place")
    assert runs == 1
    runs = 0
    file = MemoryFile(file.content)
    async with opened(file) as disk:
        await disk.write(20 * CLUSTER, b"new")
    assert runs == 2
    runs = 0
    file = MemoryFile(file.content)
    async with opened(file) as disk:
        await disk.discard(0, CLUSTER)
    assert runs == 2
    assert all(
        not any(file.content[at : at + CLUSTER]) for at in inspect_image(file.content).leaked
    )
