"""The allocator: growing the file ahead of need, taking clusters back, truncating the tail."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import closing
from typing import TYPE_CHECKING, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.space.allocator import Run
from qedfuse.disk.space.filelength import MIN_GROWTH_BYTES
from qedfuse.errors import HostError, NoSpaceError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import MAX_OFFSET
from qedfuse.ondisk.header import Header
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Truncate
from tests.support.space import Space, make_space

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.hostfile import HostFile

CLUSTER = 4096
HEADER: Final = Header(CLUSTER, 4, 1, 0, 0, 0, CLUSTER, 1 << 30)


def make(file: HostFile, bound: int = 1 << 40) -> Space:
    """Hand out the clusters of a file."""
    return make_space(file, HEADER, bound)


async def test_runs_follow_each_other_at_the_end() -> None:
    """New clusters are contiguous and never written; the file grows once for many of them."""
    file = RecordingFile(bytes(2 * CLUSTER))
    space = make(file)
    assert await space.manager.allocate(3) == Run(2 * CLUSTER, 3 * CLUSTER, never_written=True)
    assert await space.manager.allocate_table() == Run(5 * CLUSTER, 4 * CLUSTER, never_written=True)
    assert await space.manager.allocate(1) == Run(9 * CLUSTER, CLUSTER, never_written=True)
    assert file.changes == [Truncate(5 * CLUSTER + MIN_GROWTH_BYTES)]


async def test_growing_ahead_stops_at_the_bound() -> None:
    """The file grows ahead of need only up to its bound, and past it only on need."""
    file = RecordingFile(bytes(2 * CLUSTER))
    space = make(file, bound=4 * CLUSTER)
    await space.manager.allocate(1)
    assert file.size() == 4 * CLUSTER
    assert (await space.manager.allocate(5)).length == CLUSTER
    assert file.size() == 4 * CLUSTER
    assert (await space.manager.allocate(5)).length == CLUSTER
    assert file.size() == 5 * CLUSTER


async def test_release_at_the_end_and_in_the_middle() -> None:
    """Released clusters are used again, the lowest first, and do not count as never written."""
    space = make(MemoryFile(bytes(CLUSTER)))
    runs = [await space.manager.allocate(2) for _ in range(4)]
    space.manager.release(runs[2])
    space.manager.release(runs[0])
    assert await space.manager.allocate(1) == Run(runs[0].offset, CLUSTER, never_written=False)
    assert await space.manager.allocate(9) == Run(
        runs[0].offset + CLUSTER, CLUSTER, never_written=False
    )
    assert await space.manager.allocate(9) == runs[2]._replace(never_written=False)
    space.manager.release(runs[3])
    assert space.allocator.end == runs[3].offset
    assert await space.manager.allocate(1) == Run(runs[3].offset, CLUSTER, never_written=False)
    space.manager.release(Run(runs[3].offset, CLUSTER, never_written=False))
    table = await space.manager.allocate_table()
    assert table == Run(runs[3].offset, 4 * CLUSTER, never_written=False), "it holds old bytes"
    assert (await space.manager.allocate(1)).never_written


async def test_tables_do_not_use_single_free_clusters() -> None:
    """A table needs contiguous clusters, so it goes to the end of the file."""
    space = make(MemoryFile(bytes(CLUSTER)))
    first, second = await space.manager.allocate(1), await space.manager.allocate(1)
    space.manager.release(first)
    assert (await space.manager.allocate_table()).offset == second.end
    assert (await space.manager.allocate(1)).offset == first.offset


async def test_truncate_tail_cuts_unused_clusters() -> None:
    """Truncating the tail removes unused clusters at the end, and later ones are never written."""
    file = RecordingFile(bytes(CLUSTER))
    space = make(file)
    kept, given_back = await space.manager.allocate(1), await space.manager.allocate(3)
    space.manager.release(given_back)
    await space.length.truncate_tail()
    assert file.changes[1:] == [Truncate(kept.end)]
    await space.length.truncate_tail()
    assert len(file.changes) == 2, "there is nothing more to cut"
    assert await space.manager.allocate(1) == Run(kept.end, CLUSTER, never_written=True)
    assert file.size() >= kept.end + CLUSTER


async def test_allocating_while_the_file_is_truncated() -> None:
    """Clusters allocated during a truncation are inside the file, and count as written."""
    file = FailingFile(RecordingFile(bytes(CLUSTER)))
    space = make(file)
    space.manager.release(await space.manager.allocate(2))
    runs: list[Run] = []

    async def allocate() -> None:
        runs.append(await space.manager.allocate(2))
        assert file.size() >= runs[-1].end

    async with trio.open_nursery() as nursery:
        with file.hold("truncate") as held:
            nursery.start_soon(space.length.truncate_tail)
            await held.reached.wait()
            nursery.start_soon(allocate)
            nursery.start_soon(allocate)
            await wait_all_tasks_blocked()
            assert runs == []
    assert sorted(run.offset for run in runs) == [CLUSTER, 3 * CLUSTER]
    assert not min(runs).never_written


async def test_failed_truncation_keeps_the_length() -> None:
    """After a failed truncation the allocator knows the old length of the file."""
    file = FailingFile(MemoryFile(bytes(CLUSTER)))
    space = make(file)
    await space.manager.allocate(1)
    size = file.size()
    file.fail("truncate")
    with pytest.raises(HostError):
        await space.length.truncate_tail()
    assert (await space.manager.allocate(1)).end <= size
    assert file.size() == size


async def test_odd_tail_is_cut_before_the_first_growth() -> None:
    """Bytes past the last whole cluster do not show in a cluster that is allocated there."""
    file = RecordingFile(bytes(CLUSTER) + b"junk")
    space = make(file)
    await space.length.truncate_tail()
    assert file.changes == [], "it is not ours to cut while nothing is written"
    run = await space.manager.allocate(1)
    assert run == Run(CLUSTER, CLUSTER, never_written=True)
    assert file.changes == [
        Truncate(CLUSTER),
        Truncate(2 * CLUSTER + MIN_GROWTH_BYTES),
    ]


@pytest.mark.parametrize("tail", [b"", b"junk"])
async def test_growth_that_fails_for_several_tasks(tail: bytes) -> None:
    """Clusters returned after a failed growth are inside the file when they are used again."""
    file = FailingFile(MemoryFile(bytes(CLUSTER) + tail))
    space = make(file)

    async def refused() -> None:
        with pytest.raises(NoSpaceError):
            await space.manager.allocate(1)

    file.fail("truncate", None, 28)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(refused)
    file.heal()
    for _ in range(5):
        run = await space.manager.allocate(1)
        assert file.size() >= run.end
        assert file.size() % CLUSTER == 0


@pytest.mark.parametrize("how", ["allocate", "try_allocate"])
@pytest.mark.parametrize("tail", [b"", b"junk"])
async def test_each_cluster_below_a_limit_is_used(tmp_path: Path, how: str, tail: bytes) -> None:
    """Where growing ahead would exceed the host's limit of a file, the file grows by need."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * CLUSTER) + tail)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(PosixFile.open(str(path), writable=True)) as file:
        space = make(file)
        if tail:  # only `allocate` cuts it off
            await space.manager.allocate(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (space.length.end + 40 * CLUSTER + 1, hard))
        try:
            end = space.length.end + 40 * CLUSTER
            while space.allocator.end < end:
                if how == "try_allocate":
                    assert space.manager.try_allocate(1) is not None
                else:
                    await space.manager.allocate(1)
            assert space.manager.try_allocate(1) is None
            with pytest.raises(HostError) as caught:
                await space.manager.allocate(1)
            assert caught.value.errno == errno.EFBIG
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert file.size() == space.length.end == space.allocator.end == end
        await space.manager.allocate(1)
        assert file.size() > end + CLUSTER, "it does not grow ahead"


@pytest.mark.parametrize("how", ["allocate", "try_allocate"])
async def test_each_cluster_below_the_largest_offset_is_used(how: str) -> None:
    """Growing ahead stops at the largest file offset of the kernel."""
    with closing(PosixFile(os.memfd_create("file"), "file", writable=True)) as file:
        await file.truncate(CLUSTER)
        space = make(file, bound=1 << 64)
        space.allocator.end = end = MAX_OFFSET + 1 - 4 * CLUSTER
        for number in range(3):
            if how == "try_allocate":
                run = space.manager.try_allocate(1)
            else:
                run = await space.manager.allocate(1)
            assert run == Run(end + number * CLUSTER, CLUSTER, never_written=True)
        assert file.size() == end + 3 * CLUSTER
        assert space.manager.try_allocate(1) is None


async def test_largest_file_offset_is_like_a_full_host() -> None:
    """At the largest file offset of the kernel, an allocation fails as on a full host."""
    space = make(MemoryFile(bytes(CLUSTER)))
    space.allocator.end = MAX_OFFSET - MAX_OFFSET % CLUSTER
    with pytest.raises(NoSpaceError, match=f"expected at most {MAX_OFFSET}"):
        await space.manager.allocate(1)
    assert space.allocator.end == MAX_OFFSET - MAX_OFFSET % CLUSTER


async def test_try_allocate_hands_out_what_allocate_would() -> None:
    """It hands out the same clusters as `allocate` if they are neighbours."""
    file = RecordingFile(bytes(2 * CLUSTER))
    file.in_page_cache = True
    space = make(file)
    first = space.manager.try_allocate(3)
    assert first == Run(2 * CLUSTER, 3 * CLUSTER, never_written=True)
    space.manager.release(Run(2 * CLUSTER, CLUSTER, never_written=True))
    assert space.manager.try_allocate(1) == Run(2 * CLUSTER, CLUSTER, never_written=False)
    assert space.manager.try_allocate(1) == Run(5 * CLUSTER, CLUSTER, never_written=True)


async def test_try_allocate_changes_nothing_if_it_returns_none() -> None:
    """Clusters that are not neighbours, or that the file would have to grow for, stay free."""
    file = MemoryFile(bytes(2 * CLUSTER))
    file.in_page_cache = True
    space = make(file)
    runs = [space.manager.try_allocate(1) for _ in range(3)]
    assert runs[1] is not None
    space.manager.release(runs[1])
    assert space.manager.try_allocate(2) is None
    assert list(space.allocator.free.runs()) == [(3, 1)]
    end = space.allocator.end
    async with space.length.lock:
        # No free run is left, and the file does not reach over 2000 more clusters.
        assert space.manager.try_allocate(1) == runs[1]._replace(never_written=False)
        assert space.manager.try_allocate(2000) is None
    assert space.allocator.end == end
    assert space.allocator.free.count == 0
