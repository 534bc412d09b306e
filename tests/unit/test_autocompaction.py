"""Automatic compaction: a close leaves no free cluster in the file, as far as that is cheap."""

from __future__ import annotations

import errno
import logging
import random
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from qedfuse.disk.maintenance import datacompaction
from qedfuse.disk.maintenance.reversemap import build_reverse_map
from qedfuse.disk.space.freemap import BLOCK_CLUSTERS, FreeMap
from qedfuse.errors import CorruptImageError, HostError
from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES
from tests.support.compactible import (
    ALLOCATED,
    CLUSTER,
    DISCARDED,
    LongestFile,
    UsedImage,
    assert_minimal,
    content_after_discards,
    discard_some,
    full_image,
)
from tests.support.disks import (
    UNCOMPACTED,
    WRITABLE,
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
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Sync

if TYPE_CHECKING:
    from typing import Literal

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.options import OpenOptions
    from tests.support.hostfiles import Action


def reported(caplog: pytest.LogCaptureFixture) -> int | None:
    """Return how many free clusters the log says are left; None if it says nothing."""
    found = re.search(r"(\d+) free clusters \((\d+) bytes\) are left", caplog.text)
    if found is None:
        return None
    assert int(found[2]) == int(found[1]) * CLUSTER
    return int(found[1])


@pytest.mark.parametrize("seed", range(12))
async def test_an_ordinary_session_leaves_no_leak(seed: int) -> None:
    """A session on an image of any shape leaves no free cluster, within the bound."""
    choice = random.Random(seed)
    used = await UsedImage.make(choice)
    header = header_of(used.content)
    bound = header.geometry.bound(header.header_end, header.image_size)
    file = LongestFile(used.content)
    async with opened(file) as disk:
        number = choice.choice(used.pool)
        used.data.pop(number, None)
        await disk.write(number * CLUSTER, b"x" * CLUSTER)
        await disk.discard(number * CLUSTER, CLUSTER)
    used.assert_holds(file.content)
    assert not header_of(file.content).need_check
    assert file.longest <= max(len(used.content), bound)
    await assert_minimal(file.content)


@pytest.mark.parametrize("clusters", [0, 1, 4, 7, 14, 15])
async def test_no_more_is_moved_than_the_limit_allows(
    clusters: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The highest clusters move up to the limit in bytes, and the log says what is left."""
    caplog.set_level(logging.INFO)
    image = full_image()
    file = RecordingFile(image)
    options = replace(WRITABLE, compact_bytes=clusters * CLUSTER + 17)
    async with opened(file, options=options) as disk:
        await discard_some(disk)
    found = inspect_image(file.content)
    assert found.errors == ()
    assert len(file.content) == len(image) - clusters * CLUSTER
    assert found.leaks == len(DISCARDED) - clusters
    assert reported(caplog) == (found.leaks or None)
    assert ("qedimg compact image" in caplog.text) == bool(found.leaks)
    assert difference(guest_bytes(file.content), content_after_discards(image)) is None
    # What stays free takes up no space.
    assert not any(any(file.content[at : at + CLUSTER]) for at in found.leaked)
    places = [get_entry(file.content, l2_entry_offset(file.content, at)) for at in range(ALLOCATED)]
    for number in range(ALLOCATED - clusters, ALLOCATED):
        assert places[number] < get_entry(image, l2_entry_offset(image, ALLOCATED // 2))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (WRITABLE, 0),
        (UNCOMPACTED, len(DISCARDED)),
        (replace(WRITABLE, free_list="on"), len(DISCARDED)),
        (replace(WRITABLE, free_list="off"), 0),
        (replace(WRITABLE, compact="full", compact_bytes=0), 0),
    ],
)
async def test_which_options_compact(options: OpenOptions, left: int) -> None:
    """compact=off and a free list turn compaction off, and compact=full ignores its limits."""
    file = MemoryFile(full_image())
    async with opened(file, options=options) as disk:
        await discard_some(disk)
    assert inspect_image(file.content).leaks == left


def leaky() -> bytearray:
    """Return an image with leaked clusters."""
    image = full_image()
    for number in DISCARDED:
        put_entry(image, l2_entry_offset(image, number), 0)
    return image


async def test_without_a_table_change_nothing_is_moved() -> None:
    """Reads and writes in place move no cluster of an image with leaks."""
    file = RecordingFile(leaky())
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.read(0, ALLOCATED * CLUSTER)
        await disk.write(CLUSTER, b"in place")
    changed = [change for change in file.changes if not isinstance(change, Sync)]
    assert all(getattr(change, "data", b"")[:8] in (b"in place", b"") for change in changed)
    assert len(file.content) == len(leaky())


async def test_leaks_go_with_the_first_table_change() -> None:
    """A session that changes a table leaves no leak that was there before."""
    file = MemoryFile(leaky())
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(80 * CLUSTER, b"new")
    await assert_minimal(file.content)


async def test_nodiscard_moves_nothing() -> None:
    """With discard off no cluster is moved."""
    file = MemoryFile(leaky())
    async with opened(file, options=replace(WRITABLE, discard=False)) as disk:
        await disk.ensure_scanned()
        await disk.write(80 * CLUSTER, b"new")
    assert inspect_image(file.content).leaks == len(DISCARDED) - 1


async def test_without_holes_no_table_is_read() -> None:
    """The close of a session without discards reads no table."""
    image = build_image(
        5 * 512 * CLUSTER, {512 * table: pattern(CLUSTER, table) for table in range(5)}
    )
    counts = []
    for options in (UNCOMPACTED, WRITABLE):
        file = MemoryFile(image)
        # Without a cache each table that is looked at is read.
        async with opened(file, options=replace(options, cache_bytes=0)) as disk:
            await disk.ensure_scanned()
            await disk.write(7 * CLUSTER, b"new")
        counts.append(file.counts["read"])
    assert counts[0] == counts[1]


async def test_tables_are_read_until_all_owners_are_found() -> None:
    """Compaction reads the last table first and stops when all owners are found."""
    tables = 30
    image = build_image(
        tables * 512 * CLUSTER,
        {512 * table + at: pattern(CLUSTER, table) for table in range(tables) for at in (0, 1)},
    )
    seen: list[int] = []

    class Watched(MemoryFile):
        async def pread(self, offset: int, length: int) -> bytes:
            seen.append(offset)
            return await super().pread(offset, length)

    file = Watched(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.discard(0, CLUSTER)
        await disk.flush()
        seen.clear()
    l1 = header_of(image).l1_table_offset
    offsets = {get_entry(image, l1 + 8 * table) for table in range(tables)}
    assert len(offsets & set(seen)) == 1
    await assert_minimal(file.content)


async def test_tables_move_down() -> None:
    """A table at the end of the file moves to free clusters that hold a whole table."""
    span = 4 * 512
    held: dict[int, bytes | int] = {at: pattern(CLUSTER, at) for at in range(20)}
    image = build_image(3 * span * CLUSTER, held, table_size=4)
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.write(span * CLUSTER, b"a table and a cluster")
        await disk.discard(4 * CLUSTER, 8 * CLUSTER)
    await assert_minimal(file.content)
    assert len(file.content) == len(image) + (5 - 8) * CLUSTER


@pytest.mark.parametrize(("limit", "left"), [(64, 0), (11, 3)])
async def test_making_space_for_a_table_counts_towards_the_limit(
    limit: int, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A table among single free clusters costs twice its length of the limit."""
    caplog.set_level(logging.INFO)
    span = 4 * 512
    image = build_image(
        3 * span * CLUSTER, {at: pattern(CLUSTER, at) for at in range(20)}, table_size=4
    )
    file = MemoryFile(image)
    options = replace(WRITABLE, compact_bytes=limit * CLUSTER)
    async with opened(file, options=options) as disk:
        await disk.write(span * CLUSTER, b"first a table, then a cluster")
        for number in (3, 7, 11, span):
            await disk.discard(number * CLUSTER, CLUSTER)
    found = inspect_image(file.content)
    assert (found.errors, found.leaks) == ((), left)
    assert reported(caplog) == (left or None)


async def test_a_table_that_exceeds_the_limit_stays() -> None:
    """A table that the limit does not cover completely is not moved."""
    span = 4 * 512
    held: dict[int, bytes | int] = {
        at: pattern(CLUSTER, at) for at in (*range(20), *range(span, span + 8))
    }
    file = MemoryFile(build_image(3 * span * CLUSTER, held, table_size=4))
    options = replace(WRITABLE, compact_bytes=(8 + 2) * CLUSTER)
    async with opened(file, options=options) as disk:
        await disk.discard(4 * CLUSTER, 12 * CLUSTER)
    found = inspect_image(file.content)
    assert (found.errors, found.leaks) == ((), 12 - 8)


@pytest.mark.expect_log("found 1 references to clusters that have another owner")
async def test_a_damaged_image_is_left_alone() -> None:
    """No entry of an image with two owners of a cluster is changed."""
    image = leaky()
    put_entry(
        image, l2_entry_offset(image, 1), get_entry(image, l2_entry_offset(image, ALLOCATED - 1))
    )
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(80 * CLUSTER, b"new")
    for number in range(ALLOCATED):
        offset = l2_entry_offset(image, number)
        assert get_entry(file.content, offset) == get_entry(image, offset)


@pytest.mark.parametrize("unaligned", [False, True])
async def test_entries_that_a_sound_image_does_not_have(*, unaligned: bool) -> None:
    """A reverse map refuses two owners of a cluster and an unaligned entry."""
    image = full_image()
    entry = l2_entry_offset(image, 3)
    put_entry(image, entry, get_entry(image, l2_entry_offset(image, 50)) + 512 * unaligned)
    async with opened(MemoryFile(image), options=replace(UNCOMPACTED, writable=False)) as disk:
        layer = disk.chain.layers[0]
        await layer.scan_l1()  # type: ignore[attr-defined]
        text = "expected a multiple of 4096" if unaligned else "found two owners"
        with pytest.raises(CorruptImageError, match=text):
            await build_reverse_map(layer, len(image) // 2, len(image))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expected", "text"),
    [(None, "found 19 bytes, expected 4096"), (100, "the file ends within it")],
)
async def test_a_reverse_map_needs_whole_tables(expected: int | None, text: str) -> None:
    """A reverse map refuses a table that another program has cut short."""
    image = full_image()
    file = MemoryFile(image)
    async with opened(file, options=replace(UNCOMPACTED, writable=False)) as disk:
        layer = disk._components.layer
        await layer.scan_l1()
        del file.content[l2_entry_offset(image, 0) + 19 :]
        with pytest.raises(HostError, match=text):
            await build_reverse_map(layer, 0, len(image), expected)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("action", ["read", "write", "reserve"])
@pytest.mark.parametrize("nth", [1, 2, 9])
@pytest.mark.expect_log("(while compacting)")
async def test_a_failed_call_leaves_a_clean_image(action: Action, nth: int, number: int) -> None:
    """A host call that fails during compaction leaves a clean image with its content."""
    image = full_image()
    inner = MemoryFile(image)
    file = FailingFile(inner)
    # Small batches, and no cache: there are as many calls as can fail.
    options = replace(WRITABLE, cache_bytes=0)
    if action == "reserve" and nth > 1:
        nth = 1  # a table is reserved once
    async with opened(file, options=options) as disk:
        await discard_some(disk)
        await disk.flush()
        if action == "reserve":
            disk._components.layer.tables._reserved.clear()
        file.fail(action, nth, number)
    assert not header_of(inner.content).need_check
    assert inspect_image(inner.content).errors == ()
    assert difference(guest_bytes(inner.content), content_after_discards(image)) is None


@pytest.mark.expect_log("the disk is read-only from now on")
async def test_a_datasync_that_fails() -> None:
    """A failed datasync during compaction fails the close, and NEED_CHECK stays set."""
    image = full_image()
    inner = MemoryFile(image)
    file = FailingFile(inner)

    async def session() -> None:
        async with opened(file) as disk:
            await discard_some(disk)
            await disk.flush()
            file.fail("datasync", 2)

    with pytest.raises(HostError, match="datasync"):
        await session()
    assert header_of(inner.content).need_check
    assert inspect_image(inner.content).errors == ()


class SlowFile(MemoryFile):
    """A file that needs a second for each write."""

    async def pwrite(self, offset: int, *parts: bytes | bytearray | memoryview) -> None:
        """Write, slowly."""
        await trio.sleep(1)
        await super().pwrite(offset, *parts)


def test_the_time_is_limited(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow host compaction stops at its limit in seconds, and the log says what is left."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(datacompaction, "_LIMITED_BATCH_BYTES", CLUSTER)
    image = full_image()
    file = SlowFile(image)

    async def main() -> float:
        async with opened(file, options=replace(WRITABLE, compact_seconds=5.5)) as disk:
            await discard_some(disk)
            await disk.flush()
            began = trio.current_time()
        return trio.current_time() - began

    took = trio.run(main, clock=MockClock(autojump_threshold=0))
    found = inspect_image(file.content)
    assert found.errors == ()
    # Writes of tables and of the header come after the copies.
    assert 5 < took < 10
    assert 0 < found.leaks < len(DISCARDED)
    assert reported(caplog) == found.leaks
    assert len(file.content) < len(image)
    assert difference(guest_bytes(file.content), content_after_discards(image)) is None
    assert not header_of(file.content).need_check


class StoppingFile(RecordingFile):
    """A file that stops the compaction of a disk after a number of calls."""

    disk: Disk | None = None
    left = 1 << 30

    async def _enter(self, action: Action) -> None:
        """Begin a call."""
        await super()._enter(action)
        self.left -= self.disk is not None
        if self.disk is not None and self.left < 0:
            self.disk.stop_compacting()
            self.disk = None


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("step", range(3))
async def test_stopped_at_any_moment(step: int, seed: int) -> None:
    """A compaction stopped after any number of host calls leaves a clean, complete image."""
    stopped = 0
    used = await UsedImage.make(random.Random(seed))
    for calls in range(step, 400, 11):
        file = StoppingFile(used.content)
        file.left = calls
        async with opened(file, options=replace(WRITABLE, compact="full")) as disk:
            await disk.ensure_scanned()
            file.disk = disk
        used.assert_holds(file.content)
        found = inspect_image(file.content)
        assert found.errors == (), calls
        assert not header_of(file.content).need_check
        if file.left >= 0:
            assert found.leaks == 0
            break
        stopped += 1
    assert stopped


async def test_stopped_before_it_began() -> None:
    """A compaction that was stopped before it began moves nothing."""
    image = full_image()
    file = MemoryFile(image)
    async with opened(file) as disk:
        await discard_some(disk)
        disk.stop_compacting()
    assert inspect_image(file.content).leaks == len(DISCARDED)
    assert not header_of(file.content).need_check


class EndedError(Exception):
    """The error that ends a session."""


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_session_that_fails_is_not_compacted(*, cancelled: bool) -> None:
    """A session that fails or is cancelled is made durable, and nothing is moved."""
    image = full_image()
    file = MemoryFile(image)

    async def session(scope: trio.CancelScope) -> None:
        async with opened(file) as disk:
            await discard_some(disk)
            if cancelled:
                scope.cancel()
                await trio.lowlevel.checkpoint()
            raise EndedError

    with trio.CancelScope() as scope, suppress(EndedError):
        await session(scope)
    assert scope.cancelled_caught == cancelled
    assert file.closed
    assert inspect_image(file.content).leaks == len(DISCARDED)
    assert not header_of(file.content).need_check
    assert difference(guest_bytes(file.content), content_after_discards(image)) is None


async def test_cancelled_while_it_compacts() -> None:
    """A cancelled close gives up the rest of the compaction, and closes the image cleanly."""
    image = full_image()
    inner = MemoryFile(image)
    file = FailingFile(inner)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery, opened(file) as disk:
            await discard_some(disk)
            await disk.flush()
            held = file.hold("write", 3)

            async def cancel() -> None:
                await held.reached.wait()
                scope.cancel()
                held.release()

            nursery.start_soon(cancel)
    assert scope.cancelled_caught
    assert inner.closed
    found = inspect_image(inner.content)
    assert found.errors == ()
    assert 0 < found.leaks <= len(DISCARDED)
    assert not header_of(inner.content).need_check
    assert difference(guest_bytes(inner.content), content_after_discards(image)) is None


@pytest.mark.parametrize("compact", ["auto", "full"])
async def test_a_bug_in_the_compaction_loses_no_data(
    compact: Literal["auto", "full"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the compaction loses no written data, and NEED_CHECK stays set."""
    image = full_image()
    file = MemoryFile(image)

    async def bug(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        msg = "a bug"
        raise RuntimeError(msg)

    async def session() -> None:
        async with opened(file, options=replace(WRITABLE, compact=compact)) as disk:
            await discard_some(disk)
            await disk.write((ALLOCATED + 10) * CLUSTER, b"new" * 100)
            # The first thing that a compaction needs, if it is not there yet.
            scan = SimpleNamespace(run=bug, finished=trio.Event())
            monkeypatch.setattr(disk._components, "scan", scan)

    with pytest.RaisesGroup(RuntimeError, flatten_subgroups=True, allow_unwrapped=True):
        await session()
    assert file.closed
    assert guest_bytes(file.content)[(ALLOCATED + 10) * CLUSTER :].startswith(b"new" * 100)
    assert header_of(file.content).need_check
    assert inspect_image(file.content).errors == ()


async def test_tidying_before_the_close() -> None:
    """`Disk.autocompact` compacts before the close, so that its result can be reported."""
    file = MemoryFile(full_image())
    async with opened(file) as disk:
        await discard_some(disk)
        await disk.autocompact()
        assert disk.statistics().free_clusters == 0
        assert disk.statistics().file_bytes == len(full_image()) - len(DISCARDED) * CLUSTER
    await assert_minimal(file.content)


@pytest.mark.parametrize("changed", [False, True])
async def test_a_close_leaves_what_tidying_reported(*, changed: bool) -> None:
    """After Disk.tidy the close compacts again only if tables have changed."""
    file = MemoryFile(full_image())
    async with opened(file, options=replace(WRITABLE, compact_bytes=4 * CLUSTER)) as disk:
        await discard_some(disk)
        await disk.autocompact()
        statistics = disk.statistics()
        assert statistics.free_clusters == len(DISCARDED) - 4
        assert statistics.file_bytes == len(full_image()) - 4 * CLUSTER
        # A write in place changes no table.
        await disk.write((ALLOCATED - 10) * CLUSTER, b"x")
        if changed:
            await disk.discard((ALLOCATED - 10) * CLUSTER, CLUSTER)
    left = inspect_image(file.content).leaks
    if changed:
        assert left < statistics.free_clusters
    else:
        assert left == statistics.free_clusters
        assert len(file.content) == statistics.file_bytes


async def test_a_progress_callback_is_for_one_compaction() -> None:
    """A progress callback is not called for a later compaction."""
    told: list[tuple[int, int]] = []
    file = MemoryFile(full_image())
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.discard(0, CLUSTER)
        await disk.compact(lambda done, total: told.append((done, total)))
        assert told
        told.clear()
        await disk.discard(3 * CLUSTER, CLUSTER)
        assert await disk.compact() == 1
    assert told == []


class EagerFile(MemoryFile):
    """A file that answers without waiting, as a real one does from the host's cache.

    Attributes:
        switches: How often another task has run.
        looks: How often the host was searched for data, by the switch before it.
    """

    def __init__(self, content: bytes | bytearray) -> None:
        """Begin with ``content``."""
        super().__init__(content)
        self.switches = 0
        self.looks: Counter[int] = Counter()

    async def _enter(self, action: Action) -> None:
        """Start a call, without letting other tasks run."""
        self.counts[action] += 1

    async def next_data(self, offset: int) -> int | None:
        """Find where data begins."""
        self.looks[self.switches] += 1
        return await super().next_data(offset)

    async def count_switches(self) -> None:
        """Count how often this task runs."""
        while True:
            self.switches += 1
            await trio.lowlevel.checkpoint()


def sliced() -> bytearray:
    """Make an image whose tables have 16 slices: in L2 all with data, in L1 all but one holes."""
    size, table = 1 << 16, 16 * SLICE_BYTES
    entries = table // ENTRY_BYTES
    clusters = dict.fromkeys(range(0, entries, SLICE_BYTES // ENTRY_BYTES), b"x")
    return build_image(entries * size, clusters, cluster_size=size, table_size=16)


@pytest.mark.parametrize(("walk", "looks"), [("L1 table", 1), ("owners", 15)])
async def test_other_tasks_run_at_each_slice_of_a_large_table(walk: str, looks: int) -> None:
    """Other tasks run at each slice of a table that compaction reads, also at a hole."""
    file = EagerFile(sliced())
    async with opened(file, options=UNCOMPACTED) as disk:
        await disk.ensure_scanned()
        layer = disk._components.layer
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.count_switches)
            file.looks.clear()
            if walk == "L1 table":
                assert len(await disk._components.table_compaction.list_tables()) == 1
            else:
                owners = await build_reverse_map(
                    layer, layer.geometry.cluster_size, len(file.content)
                )
                assert len(owners.clusters) == 16
            nursery.cancel_scope.cancel()
    assert sum(file.looks.values()) >= looks
    # Two if the scheduler runs the other task first in one batch and last in the next.
    assert max(file.looks.values()) <= 2


@pytest.mark.parametrize("anchor", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_where_a_number_of_used_clusters_begins(seed: int, anchor: int) -> None:
    """FreeMap.tail_start agrees with counting one cluster at a time, across blocks."""
    choice = random.Random(seed)
    end = 2 * BLOCK_CLUSTERS + 100
    clusters = FreeMap(4, anchor)
    flags = np.zeros(end, np.bool_)
    for _ in range(choice.choice((1, 40, 3000))):
        first = choice.randrange(end - 70)
        count = choice.choice((1, 2, 70))
        flags[first : first + count] = True
        clusters.add(first, count)
    for _ in range(40):
        used = choice.choice(
            (0, 1, 2, 5, 100, BLOCK_CLUSTERS, 2 * BLOCK_CLUSTERS, 3 * BLOCK_CLUSTERS)
        )
        limit = choice.randrange(end + 1)
        expected = limit
        left = used
        while expected and (flags[expected - 1] or left):
            left -= not flags[expected - 1]
            expected -= 1
        assert clusters.tail_start(limit, used) == expected


def test_where_all_clusters_of_the_first_block_may_be_used() -> None:
    """FreeMap.tail_start counts no used cluster below cluster 0, where block 0 begins."""
    clusters = FreeMap(4, 5)
    clusters.add(10, 5)
    assert clusters.alignment == 3
    assert [clusters.tail_start(20, used) for used in (14, 15, 16, 17, 18)] == [1, 0, 0, 0, 0]
