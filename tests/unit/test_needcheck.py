"""NEED_CHECK is in the file before the tables change, and cleared when all is durable (D3)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ZERO
from tests.support.disks import (
    WRITABLE,
    build_image,
    header_of,
    inspect_image,
    l2_entry_offset,
    opened,
    put_entry,
)
from tests.support.hostfiles import (
    FailingFile,
    HeldCall,
    RecordingFile,
    Sync,
    Truncate,
    Write,
    apply,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.support.hostfiles import Action

CLUSTER = 4096
SIZE = 64 * CLUSTER
IMAGE = build_image(SIZE, {0: b"a" * CLUSTER, 1: ZERO})
TABLES = range(CLUSTER, 3 * CLUSTER)  # of IMAGE: the L1 table and the only L2 table
IDLE = replace(WRITABLE, needcheck_seconds=5.0)
BUSY = replace(IDLE, commit_seconds=1.0)


def in_file(file: RecordingFile) -> bool:
    """Return whether the bit is set in the file."""
    return header_of(file.content).need_check


def bit_at_table_writes(file: RecordingFile) -> list[bool]:
    """Return for each table write whether the bit was durable in the file before it."""
    content = bytearray(file.initial)
    durable = header_of(content).need_check
    result = []
    for change in file.changes:
        if isinstance(change, Write) and change.offset in TABLES:
            result.append(durable)
        apply(content, change)
        if isinstance(change, Sync):
            durable = header_of(content).need_check
    return result


async def test_set_before_the_first_table_write_and_cleared_at_close() -> None:
    """The bit is durable before the first table write, and a close clears it."""
    file = RecordingFile(IMAGE)
    async with opened(file) as disk:
        await disk.write(0, b"in place")
        assert not in_file(file), "a write in place changes no table"
        await disk.write(CLUSTER, b"new")
        assert in_file(file)
        assert disk.header.need_check
        await disk.flush()
        assert in_file(file)
    assert not in_file(file)
    assert bit_at_table_writes(file) == [True]
    assert isinstance(file.changes[-1], Sync)


async def test_overlays_set_it_too() -> None:
    """A copy-on-write into an overlay sets the bit."""
    file = RecordingFile(build_image(SIZE, backing=b"base"))
    async with opened(file, [b"base" * 1000]) as disk:
        await disk.write(100, b"x")
        assert in_file(file)
    assert not in_file(file)


@pytest.mark.parametrize("commit_seconds", [1.0, 3600.0])
async def test_cleared_by_the_background_task_after_idling(
    autojump_clock: MockClock, commit_seconds: float
) -> None:
    """The bit is cleared durably some seconds after the last change, and not before."""
    file = RecordingFile(IMAGE)
    async with opened(file, options=replace(IDLE, commit_seconds=commit_seconds)) as disk:
        await disk.write(CLUSTER, b"new")
        await trio.sleep(4)
        await disk.write(2 * CLUSTER, b"another")
        await trio.sleep(4)
        assert in_file(file), "the second write has begun the time anew"
        await trio.sleep(2)
        assert not in_file(file)
        assert isinstance(file.changes[-1], Sync)
        before = len(file.changes)
        await trio.sleep(100)
        assert len(file.changes) == before, "an idle disk is left alone"
        await disk.write(3 * CLUSTER, b"more")
        assert in_file(file)
        await trio.sleep(6)
        assert not in_file(file)
    assert all(bit_at_table_writes(file))
    assert autojump_clock.current_time() > 100


async def test_not_cleared_while_a_write_is_under_way(autojump_clock: MockClock) -> None:
    """The bit stays set during a write, however long that takes."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file, options=BUSY) as disk, trio.open_nursery() as nursery:
        await disk.write(CLUSTER, b"first")
        with file.hold("write") as held:
            nursery.start_soon(disk.write, 2 * CLUSTER, b"slow")
            await held.reached.wait()
            await trio.sleep(50)
            assert in_file(recording)
        await trio.sleep(20)
        assert not in_file(recording)
    assert all(bit_at_table_writes(recording))
    assert inspect_image(recording.content).leaks == 0
    assert autojump_clock.current_time() >= 70


@pytest.mark.parametrize(
    ("action", "nth"),
    [
        ("datasync", 1),
        ("write", 1),
        ("datasync", 2),
        ("truncate", 1),
        ("write", 2),
        ("datasync", 3),
    ],
)
async def test_change_that_comes_while_the_bit_is_cleared(
    action: Action, nth: int, autojump_clock: MockClock
) -> None:
    """A write that comes during any host call of the clearing keeps or sets the bit again."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file, options=IDLE) as disk, trio.open_nursery() as nursery:
        await disk.write(CLUSTER, b"first")
        with file.hold(action, nth) as held:
            with trio.fail_after(60):
                await held.reached.wait()
            assert autojump_clock.current_time() == IDLE.needcheck_seconds
            nursery.start_soon(disk.write, 2 * CLUSTER, b"second")
            await wait_all_tasks_blocked()
        await disk.flush()
        assert in_file(recording)
        await trio.sleep(60)
        assert not in_file(recording)
    assert all(bit_at_table_writes(recording))
    assert inspect_image(recording.content) == inspect_image(IMAGE)


async def test_damage_that_is_found_during_the_clearing_keeps_it_set(
    autojump_clock: MockClock,
) -> None:
    """If a read finds damage while the file is being cut, the bit stays set."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file, options=IDLE) as disk:
        await disk.write(CLUSTER, b"new")
        with file.hold("truncate") as held:
            await held.reached.wait()
            assert autojump_clock.current_time() >= IDLE.needcheck_seconds
            layer = disk.chain.layers[0]
            assert isinstance(layer, QedLayer)
            layer.mark_damaged()
        await trio.sleep(60)
    assert in_file(recording)


@pytest.mark.expect_log("while clearing NEED_CHECK")
async def test_not_cleared_after_a_failed_table_write(autojump_clock: MockClock) -> None:
    """The bit stays set while a table cannot be written, and is cleared once it is."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file, options=IDLE) as disk:
        await disk.write(CLUSTER, b"new")
        file.fail("write", None)
        await trio.sleep(30)
        assert in_file(recording)
        with pytest.raises(HostError):
            await disk.flush()
        file.heal()
        await trio.sleep(30)
        assert not in_file(recording)
    assert autojump_clock.current_time() >= 60


@pytest.mark.expect_log("read-only from now on")
@pytest.mark.expect_log("while")
@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_never_cleared_after_a_failed_datasync(autojump_clock: MockClock, nth: int) -> None:
    """After a failed datasync neither the background task nor a close clears the bit (D7)."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    with pytest.raises(HostError, match="datasync"):  # noqa: PT012  closing raises it
        async with opened(file, options=BUSY) as disk:
            await disk.write(CLUSTER, b"new")
            file.fail("datasync", nth)
            await trio.sleep(60)
            assert not disk.writable
            before = len(recording.changes)
            assert in_file(recording)
    assert len(recording.changes) == before
    assert autojump_clock.current_time() >= 60


async def test_bit_that_could_not_be_written_protects_nothing() -> None:
    """A write that cannot set the bit fails, and the next write sets it again."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file) as disk:
        file.fail("write")
        with pytest.raises(HostError):
            await disk.write(CLUSTER, b"x")
        await disk.write(CLUSTER, b"y")
        await disk.flush()
        assert in_file(recording)
    assert bit_at_table_writes(recording) == [True]


async def test_second_writer_waits_for_the_bit_of_the_first() -> None:
    """While one task writes the bit, other tasks do not change tables."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file) as disk, trio.open_nursery() as nursery:
        with file.hold("write") as held:
            nursery.start_soon(disk.write, CLUSTER, b"first")
            await held.reached.wait()
            nursery.start_soon(disk.write, 2 * CLUSTER, b"second")
            await wait_all_tasks_blocked()
            nursery.start_soon(disk.flush)
            await wait_all_tasks_blocked()
            assert not [change for change in recording.changes if isinstance(change, Write)]
    assert all(bit_at_table_writes(recording))


async def test_bit_found_set_is_cleared_without_a_change(autojump_clock: MockClock) -> None:
    """A bit that a sound image had at opening is cleared after the same time."""
    image = build_image(SIZE, {0: b"a"}, features=2)
    file = RecordingFile(image)
    async with opened(file, options=IDLE):
        await trio.sleep(4)
        assert in_file(file)
        await trio.sleep(2)
        assert not in_file(file)
    assert autojump_clock.current_time() >= 6


async def test_file_is_cut_to_what_is_in_use_when_idle(autojump_clock: MockClock) -> None:
    """An idle disk truncates what its file was grown ahead, and grows it again on need."""
    file = RecordingFile(IMAGE)
    async with opened(file, options=IDLE) as disk:
        await disk.write(CLUSTER, b"new")
        assert len(file.content) > len(IMAGE) + CLUSTER
        await trio.sleep(6)
        assert len(file.content) == len(IMAGE) + CLUSTER
        await disk.write(2 * CLUSTER, b"more")
        await trio.sleep(6)
        assert len(file.content) == len(IMAGE) + 2 * CLUSTER
    cuts = [change for change in file.changes if isinstance(change, Truncate)]
    assert len(cuts) == 4
    assert autojump_clock.current_time() >= 12


@pytest.mark.expect_log("while clearing NEED_CHECK")
async def test_clearing_that_failed_is_tried_again(autojump_clock: MockClock) -> None:
    """A failed clearing is tried again."""
    recording = RecordingFile(IMAGE)
    file = FailingFile(recording)
    async with opened(file, options=IDLE) as disk:
        await disk.write(CLUSTER, b"new")
        await disk.flush()
        file.fail("write")
        await trio.sleep(6)
        assert in_file(recording)
        await trio.sleep(6)
        assert not in_file(recording)
    assert autojump_clock.current_time() >= 12


class _PatchyFile(RecordingFile):
    """A cached file that can hold up its first cut, and refuse inline datasyncs.

    Attributes:
        fast_datasyncs: How many further datasyncs can be made inline; None for any number.
        cut: The first cut, which is held up.
    """

    def __init__(self, content: bytes | bytearray) -> None:
        """Start with ``content`` and an unlimited number of inline datasyncs."""
        super().__init__(content)
        self.in_page_cache = True
        self.fast_datasyncs: int | None = None
        self.cut = HeldCall("truncate", 1)

    def try_datasync(self) -> bool:
        """Make everything durable, if an inline datasync is left."""
        if self.fast_datasyncs is not None:
            if not self.fast_datasyncs:
                return False
            self.fast_datasyncs -= 1
        return super().try_datasync()

    async def truncate(self, size: int) -> None:
        """Set the length when the cut is released."""
        await self.cut.wait()
        await super().truncate(size)


async def test_not_cleared_while_an_inline_cycle_lacks_its_last_datasync(
    autojump_clock: MockClock,
) -> None:
    """Table writes of an inline cycle that could not make its last datasync are not durable."""
    file = _PatchyFile(build_image(SIZE, {0: b"a", 1: b"b", 2: b"c"}))
    async with opened(file, options=IDLE) as disk:
        with file.cut:
            await disk.ensure_scanned()
            await disk.write(3 * CLUSTER, b"grows the file by more than a cluster")
            await disk.discard(CLUSTER, CLUSTER)
            await disk.flush()
            assert disk.statistics().free_clusters == 1
            with trio.fail_after(60):
                await file.cut.reached.wait()
            assert autojump_clock.current_time() == IDLE.needcheck_seconds
            assert disk.try_write(5 * CLUSTER, b"new"), "there is a free cluster"
            file.fast_datasyncs = 1
            written = disk.statistics().writeback.table_writes
            assert not disk.try_flush()
            assert disk.statistics().writeback.table_writes == written + 1
        await wait_all_tasks_blocked()
        assert in_file(file)
        file.fast_datasyncs = None
        await trio.sleep(60)
        assert not in_file(file)


FAR = 512
"""A guest cluster that the second L2 table of `two_tables` describes."""


def two_tables(*, dangling: bool, need_check: bool = False) -> bytearray:
    """Return an image with two L2 tables; an entry of the second one may point past the end."""
    clusters: dict[int, bytes | int] = {0: b"a", FAR: b"b"}
    image = build_image(2 * FAR * CLUSTER, clusters, features=2 * need_check)
    if dangling:
        put_entry(image, l2_entry_offset(image, FAR + 1), len(image))
    return image


@pytest.mark.parametrize(
    "dangling",
    [False, pytest.param(True, marks=pytest.mark.expect_log("found invalid table entries"))],
)
async def test_not_cleared_over_a_grown_file_before_the_scan_has_ended(
    autojump_clock: MockClock, *, dangling: bool
) -> None:
    """The idle disk keeps the bit until the scan has read all entries, some of which may be bad."""
    recording = RecordingFile(two_tables(dangling=dangling))
    file = FailingFile(recording)
    held = file.hold("read", nth=4)
    async with opened(file, options=IDLE) as disk:
        with held:
            await held.reached.wait()  # the second table has not been read
            await disk.write(CLUSTER, b"new")
            await trio.sleep(60)
            assert in_file(recording)
            changes = len(recording.changes)
            await trio.sleep(60)
            assert len(recording.changes) == changes, "each further attempt changes nothing"
        await trio.sleep(60)
        assert in_file(recording) == dangling
    assert in_file(recording) == dangling
    assert autojump_clock.current_time() >= 180


@pytest.mark.parametrize(
    "dangling",
    [False, pytest.param(True, marks=pytest.mark.expect_log("found invalid table entries"))],
)
async def test_a_close_completes_the_scan_of_a_grown_file(*, dangling: bool) -> None:
    """Before a close clears the bit it reads all entries, because one may point past the old end.

    Otherwise such an entry and that of the new cluster would share the cluster from then on.
    """
    recording = RecordingFile(two_tables(dangling=dangling))
    file = FailingFile(recording)
    held = file.hold("read", nth=4)
    async with opened(file) as disk:
        with held:
            await held.reached.wait()
            await disk.write(CLUSTER, b"new")
    assert in_file(recording) == dangling
    assert bool(inspect_image(recording.content).errors) == dangling


@pytest.mark.expect_log("Input/output error (while looking for free space)")
async def test_a_cut_is_durable_before_the_bit_is_cleared_without_a_scan() -> None:
    """An entry that no scan has read may point past the cut: a crash must not undo only the cut."""
    recording = RecordingFile(two_tables(dangling=True))
    file = FailingFile(recording)
    file.fail("read", nth=4)
    async with opened(file) as disk:
        await disk.ensure_scanned()
        file.fail("write", nth=2)  # that of the data, after the one of the header
        with pytest.raises(HostError):
            await disk.write(CLUSTER, b"new")
    assert not in_file(recording)
    cut = max(at for at, change in enumerate(recording.changes) if isinstance(change, Truncate))
    after = recording.changes[cut + 1 :]
    assert isinstance(after[0], Sync)
    assert any(isinstance(change, Write) for change in after)


@pytest.mark.expect_log("Input/output error (while looking for free space)")
@pytest.mark.expect_log("NEED_CHECK stays set, because the file has grown and the tables could")
async def test_not_cleared_over_a_grown_file_after_a_failed_scan(
    autojump_clock: MockClock,
) -> None:
    """A table that could not be read may have an entry that points to what the file has now."""
    recording = RecordingFile(two_tables(dangling=True))
    file = FailingFile(recording)
    file.fail("read", nth=4)
    async with opened(file, options=IDLE) as disk:
        await disk.ensure_scanned()
        await disk.write(CLUSTER, b"new")
        await trio.sleep(60)
        assert in_file(recording)
    assert in_file(recording)
    assert autojump_clock.current_time() >= 60


@pytest.mark.expect_log("Input/output error (while looking for free space)")
async def test_cleared_after_a_failed_scan_if_the_file_has_not_grown() -> None:
    """Entries that could not be read still point past the end of a file that has not grown."""
    recording = RecordingFile(two_tables(dangling=False, need_check=True))
    file = FailingFile(recording)
    file.fail("read", nth=4)
    async with opened(file) as disk:
        await disk.ensure_scanned()
    assert not in_file(recording)


@pytest.mark.expect_log("too large to check: found more than 5 references")
@pytest.mark.parametrize("dangling", [False, True])
async def test_a_scan_beyond_its_memory_still_validates_all_entries(
    monkeypatch: pytest.MonkeyPatch, *, dangling: bool
) -> None:
    """An image that is too large to be checked does not keep the bit, unless an entry is bad."""
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_BITMAP_CLUSTERS", 0)
    # Header, L1 table, two L2 tables, and the cluster of the first table.
    monkeypatch.setattr("qedfuse.disk.space.ownerbitmap.MAX_LISTED_CLUSTERS", 5)
    file = RecordingFile(two_tables(dangling=dangling))
    async with opened(file) as disk:
        await disk.ensure_scanned()
        await disk.write(CLUSTER, b"new")
    assert in_file(file) == dangling
