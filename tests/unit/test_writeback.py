"""Flushes: their number of host calls, shared cycles, and failures (D2, D4, D7)."""

from __future__ import annotations

import errno
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.writeback.metadata import WritebackStatistics
from qedfuse.errors import HeaderError, HostError, NeedsCheckError, NoSpaceError, ReadOnlyError
from tests.support.disks import (
    WRITABLE,
    build_image,
    guest_bytes,
    header_of,
    inspect_image,
    opened,
)
from tests.support.hostfiles import FailingFile, MemoryFile, RecordingFile, Sync, Write

if TYPE_CHECKING:
    from trio.testing import MockClock

    from qedfuse.disk.disk import Disk
    from qedfuse.errors import QedError

CLUSTER = 4096
SPAN = 512 * CLUSTER
SIZE = 4 * SPAN


def table_writes(file: RecordingFile, tables: int = 3 * CLUSTER) -> list[int]:
    """Return the offsets of the writes to the L1 table and the first L2 table."""
    return [
        change.offset
        for change in file.changes
        if isinstance(change, Write) and CLUSTER <= change.offset < tables
    ]


async def test_allocations_write_no_tables(autojump_clock: MockClock) -> None:
    """Many new clusters cost a few table writes at the flush, not one each (D4)."""
    file = RecordingFile(build_image(SIZE))
    async with opened(file, options=replace(WRITABLE, commit_seconds=5.0)) as disk:
        for number in range(400):
            await disk.write(number * CLUSTER, b"x")
        assert disk.statistics().writeback.table_writes == 0
        assert table_writes(file) == []
        await trio.sleep(6)
        assert disk.statistics().writeback.table_writes == 2, "one for each of L2 and L1"
        assert len(table_writes(file)) == 2
        await disk.flush()
        await trio.sleep(20)
        assert disk.statistics().writeback.cycles == 1
    assert autojump_clock.current_time() >= 26


async def test_dirty_tables_are_written_when_they_exceed_their_budget() -> None:
    """Dirty tables are written back when they exceed their budget, without a flush."""
    file = RecordingFile(build_image(64 * SPAN))
    options = replace(WRITABLE, cache_bytes=16 * CLUSTER)
    async with opened(file, options=options) as disk:
        for number in range(64):
            await disk.write(number * SPAN, b"x")
            assert disk.statistics().tables.total_bytes < 30 * CLUSTER
        assert disk.statistics().writeback.cycles >= 6
    assert inspect_image(file.content).errors == ()


async def test_cycle_costs_one_datasync_for_each_step_with_work() -> None:
    """A cycle has one datasync each after data, L2 and L1 entries that were written (D2)."""
    file = RecordingFile(build_image(SIZE, {0: b"a"}))
    async with opened(file) as disk:
        for write, cost in (
            ((0, b"in place"), 1),
            ((CLUSTER, b"new cluster"), 2),
            ((SPAN, b"new table"), 3),
        ):
            await disk.write(*write)
            before = file.counts["datasync"]
            await disk.flush()
            assert file.counts["datasync"] - before == cost
            await disk.flush()
            assert file.counts["datasync"] - before == cost, "nothing new, nothing to do"


async def test_order_within_a_cycle() -> None:
    """A cycle writes data, datasync, L2 entries, datasync, L1 entries, datasync."""
    file = RecordingFile(build_image(SIZE))
    async with opened(file) as disk:
        await disk.write(0, b"data")
        before = len(file.changes)
        await disk.flush()
        steps = file.changes[before:]
    kinds = [
        "sync" if isinstance(step, Sync) else step.offset // CLUSTER  # type: ignore[union-attr]
        for step in steps
    ]
    assert kinds == ["sync", 2, "sync", 1, "sync"]


async def test_concurrent_flushes_share_a_cycle() -> None:
    """All flushes that come during a cycle share the next one."""
    recording = RecordingFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(recording)
    async with opened(file) as disk, trio.open_nursery() as nursery:
        await disk.write(0, b"first")
        with file.hold("datasync") as held:
            nursery.start_soon(disk.flush)
            await held.reached.wait()
            await disk.write(0, b"second")
            for _ in range(20):
                nursery.start_soon(disk.flush)
            await wait_all_tasks_blocked()
            assert file.calls["datasync"] == 1
        await wait_all_tasks_blocked()
        assert file.calls["datasync"] == 2
        assert disk.statistics().writeback.cycles == 2


async def test_joined_cycle_with_nothing_left_to_do() -> None:
    """A flush that a running cycle covers completely costs no further datasync."""
    recording = RecordingFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(recording)
    async with opened(file) as disk, trio.open_nursery() as nursery:
        await disk.write(0, b"first")
        with file.hold("datasync") as held:
            nursery.start_soon(disk.flush)
            await held.reached.wait()
            for _ in range(20):
                nursery.start_soon(disk.flush)
            await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert file.calls["datasync"] == 1
    assert recording.closed


async def test_write_during_a_cycle_is_not_taken_for_durable() -> None:
    """A write during a cycle is made durable by the next one."""
    recording = RecordingFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(recording)
    async with opened(file) as disk, trio.open_nursery() as nursery:
        await disk.write(0, b"first")
        with file.hold("datasync") as held:
            nursery.start_soon(disk.flush)
            await held.reached.wait()
            await disk.write(512, b"second")
            await disk.write(SPAN + CLUSTER, b"third")
        await wait_all_tasks_blocked()
        await disk.flush()
        place = max(n for n, change in enumerate(recording.changes) if isinstance(change, Write))
        assert any(isinstance(change, Sync) for change in recording.changes[place:])
        expected = guest_bytes(recording.content)
        assert expected[512:518] == b"second"
        assert expected[SPAN + CLUSTER : SPAN + CLUSTER + 5] == b"third"


async def flush_error(disk: Disk, errors: list[HostError]) -> None:
    """Flush and keep the error."""
    try:
        await disk.flush()
    except HostError as error:
        errors.append(error)


@pytest.mark.expect_log("read-only from now on")
@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_failed_datasync_ends_writing(nth: int) -> None:
    """A failed datasync fails all waiting flushes and ends writing; NEED_CHECK stays (D7)."""
    recording = RecordingFile(build_image(SIZE))
    file = FailingFile(recording)
    errors: list[HostError] = []
    with pytest.raises(HostError, match="image: datasync: Input/output error"):  # noqa: PT012  closing raises it
        async with opened(file) as disk:
            await disk.write(0, b"data")
            file.fail("datasync", nth)
            async with trio.open_nursery() as nursery:
                with file.hold("datasync", nth) as held:
                    nursery.start_soon(flush_error, disk, errors)
                    await held.reached.wait()
                    for _ in range(3):
                        nursery.start_soon(flush_error, disk, errors)
                    await wait_all_tasks_blocked()
            assert len(errors) == 4
            assert not disk.writable
            assert disk.failure == "image: datasync: Input/output error"
            with pytest.raises(ReadOnlyError, match="read-only: image: datasync: Input/output"):
                await disk.write(0, b"more")
            with pytest.raises(ReadOnlyError):
                await disk.grow(2 * SIZE)
            assert (await disk.read(0, 4)) == b"data", "reading goes on"
            before = len(recording.changes)
    assert recording.changes[before:] == []
    assert recording.closed
    assert header_of(recording.content).need_check
    assert inspect_image(recording.content).errors == ()


@pytest.mark.expect_log("read-only from now on")
async def test_joiners_of_a_failed_cycle_get_its_error() -> None:
    """All flushes that share a failed cycle raise its error."""
    recording = RecordingFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(recording)
    errors: list[HostError] = []
    with pytest.raises(HostError):  # noqa: PT012  closing raises it
        async with opened(file) as disk:
            await disk.write(0, b"x")
            async with trio.open_nursery() as nursery:
                with file.hold("datasync") as held:
                    nursery.start_soon(disk.flush)
                    await held.reached.wait()
                    await disk.write(0, b"y")
                    file.fail("datasync")
                    for _ in range(5):
                        nursery.start_soon(flush_error, disk, errors)
                    await wait_all_tasks_blocked()
            assert file.calls["datasync"] == 2
    assert len(errors) == 5


@pytest.mark.parametrize("number", [28, 5])
@pytest.mark.parametrize("short", [0, 4])
async def test_failed_table_write_is_reported_and_tried_again(number: int, short: int) -> None:
    """After a failed table write the tables stay dirty, and the next flush writes them."""
    recording = RecordingFile(build_image(SIZE))
    file = FailingFile(recording)
    async with opened(file) as disk:
        await disk.write(0, b"data")
        await disk.write(SPAN, b"more")
        for nth in (1, 2, 2):
            file.fail("write", nth, number, short=short)
            with pytest.raises(NoSpaceError if number == 28 else HostError):
                await disk.flush()
            assert disk.writable
            assert header_of(recording.content).need_check
            file.heal()
        await disk.write(2 * SPAN, b"again")
        await disk.flush()
        content = guest_bytes(recording.content)
    assert content[:4] == b"data"
    assert content[SPAN : SPAN + 4] == b"more"
    assert content[2 * SPAN : 2 * SPAN + 5] == b"again"
    assert inspect_image(recording.content).errors == ()
    assert inspect_image(recording.content).leaks == 0
    assert not header_of(recording.content).need_check


@pytest.mark.expect_log("while writing back tables")
async def test_background_failure_is_reported_to_the_next_flush(
    autojump_clock: MockClock,
) -> None:
    """A failure of the background write-back is raised by the next flush."""
    recording = RecordingFile(build_image(SIZE))
    file = FailingFile(recording)
    async with opened(file, options=replace(WRITABLE, commit_seconds=2.0)) as disk:
        await disk.write(0, b"data")
        file.fail("write", None, 28)
        await trio.sleep(9)
        with pytest.raises(NoSpaceError):
            await disk.flush()
        file.heal()
        await trio.sleep(3)
        assert guest_bytes(recording.content)[:4] == b"data"
    assert autojump_clock.current_time() >= 12


@pytest.mark.parametrize("step", range(8))
async def test_cancelled_flush(step: int) -> None:
    """A cancelled flush affects neither the flushes that share its cycle nor the tables."""
    recording = RecordingFile(build_image(SIZE))
    async with opened(recording) as disk:
        await disk.write(0, b"data")
        async with trio.open_nursery() as others, trio.open_nursery() as nursery:
            nursery.start_soon(disk.flush)
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            others.start_soon(disk.flush)
            nursery.start_soon(disk.flush)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert guest_bytes(recording.content)[:4] == b"data"
        assert isinstance(recording.changes[-1], Sync)
        await disk.write(SPAN, b"more")
    assert guest_bytes(recording.content)[SPAN : SPAN + 4] == b"more"
    assert inspect_image(recording.content).leaks == 0


async def test_closing_beside_the_background_flush(autojump_clock: MockClock) -> None:
    """A background flush that waits for another cycle ends before the file is closed."""
    recording = RecordingFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(recording)
    async with opened(file, options=replace(WRITABLE, commit_seconds=1.0)) as disk:
        await disk.write(0, b"first")
        async with trio.open_nursery() as nursery:
            with file.hold("datasync") as held:
                nursery.start_soon(disk.flush)
                await held.reached.wait()
                await trio.sleep(5)
    assert autojump_clock.current_time() >= 5


@pytest.mark.expect_log("the disk is read-only from now on")
async def test_each_failed_flush_raises_an_error_of_its_own() -> None:
    """Each failed flush raises its own copy of the error, without the tracebacks of others."""
    inner = MemoryFile(build_image(SIZE, {0: b"x"}))
    file = FailingFile(inner)
    raised: list[HostError] = []
    manager = opened(file)
    disk = await manager.__aenter__()

    async def flush() -> None:
        try:
            await disk.flush()
        except HostError as error:
            raised.append(error)

    await disk.write(0, b"y")
    file.fail("datasync")
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(flush)
    for _ in range(5):
        await flush()
    with pytest.raises(HostError) as caught:
        await manager.__aexit__(None, None, None)
    raised.append(caught.value)
    assert len({id(error) for error in raised}) == 11
    assert {(str(error), error.errno, type(error)) for error in raised} == {
        ("image: datasync: Input/output error", errno.EIO, HostError)
    }
    lengths = [len(traceback.extract_tb(error.__traceback__)) for error in raised[5:10]]
    assert len(set(lengths)) == 1, lengths


@pytest.mark.parametrize(
    "error",
    [
        HostError("host", errno.ENOSPC),
        HeaderError("image", "features", 1, "0"),
        NeedsCheckError("check"),
        NoSpaceError("full"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_can_be_raised_again(error: QedError) -> None:
    """A copy of an error has the same message and attributes, and no traceback."""
    with pytest.raises(type(error)):
        raise error
    again = error.again()
    assert (type(again), str(again), again.args) == (type(error), str(error), error.args)
    assert (again.errno, vars(again)) == (error.errno, vars(error))
    assert again.__traceback__ is None


async def test_a_flush_without_tables_is_one_datasync_that_waits_for_nothing() -> None:
    """After a write in place, a flush on the fast path is one datasync and nothing else."""
    file = RecordingFile(build_image(SIZE, {0: b"a"}))
    async with opened(file) as disk:
        await disk.read(0, 1)  # the table is in memory then
        file.in_page_cache = True
        assert disk.try_write(0, b"in place")
        before = len(file.changes)
        assert disk.try_flush()
        assert file.changes[before:] == [Sync()]
        assert disk.try_flush(), "nothing was written since"
        assert file.changes[before:] == [Sync()]
        assert disk.statistics().writeback.datasyncs == 1


async def test_a_flush_of_few_slices_waits_for_nothing() -> None:
    """After a new cluster, the entries are written between two datasyncs on the fast path (D2)."""
    file = RecordingFile(build_image(SIZE, {0: b"a"}))
    async with opened(file) as disk:
        await disk.write(CLUSTER, b"new cluster")
        file.in_page_cache = True
        before = len(file.changes)
        assert disk.try_flush()
        first, entries, last = file.changes[before:]
        assert (first, last) == (Sync(), Sync())
        assert table_writes(file) == [entries.offset]  # type: ignore[union-attr]
        assert disk.try_flush(), "nothing was written since"
        assert len(file.changes) == before + 3
        assert disk.statistics().writeback == WritebackStatistics(1, 2, 1)
    assert inspect_image(file.content).errors == ()


async def test_a_flush_that_would_wait_does_nothing_on_the_fast_path() -> None:
    """If a datasync would wait, if many slices are dirty or the L1 table is, nothing happens."""
    file = RecordingFile(build_image(16 * SPAN, {number * 512: b"a" for number in range(15)}))
    async with opened(file) as disk:
        await disk.write(0, b"in place")
        before = len(file.changes)
        assert not disk.try_flush(), "the datasync would wait"
        assert len(file.changes) == before
        await disk.write(15 * SPAN, b"new table")
        file.in_page_cache = True
        before = len(file.changes)
        assert not disk.try_flush(), "the L1 table is dirty"
        assert len(file.changes) == before
        await disk.flush()
        for number in range(5):
            await disk.write(number * SPAN + CLUSTER, b"new cluster")
        before = len(file.changes)
        assert not disk.try_flush(), "many slices are dirty"
        assert len(file.changes) == before
        await disk.flush()
        assert len(file.changes) > before
    assert inspect_image(file.content).errors == ()


@pytest.mark.parametrize("refused", ["write", "datasync"])
async def test_a_flush_that_the_fast_path_cannot_complete_is_completed_by_the_slow_path(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not written is dirty again, and what was written is made durable."""
    file = RecordingFile(build_image(SIZE, {0: b"a"}))
    async with opened(file) as disk:
        await disk.write(CLUSTER, b"new cluster")
        file.in_page_cache = True
        refusals: list[int] = []

        def refuse(*_: object) -> bool:
            refusals.append(len(file.changes))
            return False

        if refused == "write":
            monkeypatch.setattr(file, "try_write", refuse)
        else:
            datasync = file.try_datasync
            monkeypatch.setattr(
                file, "try_datasync", lambda: datasync() if not table_writes(file) else refuse()
            )
        assert not disk.try_flush()
        assert len(refusals) == 1
        monkeypatch.undo()
        assert len(table_writes(file)) == (refused == "datasync")
        before = len(file.changes)
        await disk.flush()
        assert file.changes[before] == Sync()
        assert file.changes[-1] == Sync()
        assert len(table_writes(file)) == 1
    assert inspect_image(file.content).errors == ()


async def test_a_flush_on_the_fast_path_does_not_overtake_a_cycle() -> None:
    """While a cycle runs, the fast path of a flush does nothing."""
    inner = RecordingFile(build_image(SIZE, {0: b"a"}))
    file = FailingFile(inner)
    async with opened(file) as disk, trio.open_nursery() as nursery:
        await disk.write(0, b"in place")
        held = file.hold("datasync")
        nursery.start_soon(disk.flush)
        await held.reached.wait()
        inner.in_page_cache = True
        file.try_datasync = inner.try_datasync  # type: ignore[method-assign]
        assert not disk.try_flush()
        assert Sync() not in inner.changes
        held.release()


@pytest.mark.expect_log("read-only from now on")
async def test_a_datasync_that_fails_on_the_fast_path_makes_the_disk_read_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a failed datasync on the fast path, each flush raises its error (D7)."""
    file = RecordingFile(build_image(SIZE, {0: b"a"}))

    def fail() -> bool:
        raise HostError.from_os(OSError(errno.EIO, "broken"), file.name, "datasync")

    with pytest.raises(HostError):  # noqa: PT012  the close fails as well
        async with opened(file) as disk:
            await disk.write(0, b"in place")
            monkeypatch.setattr(file, "try_datasync", fail)
            assert not disk.try_flush()
            assert not disk.writable
            monkeypatch.undo()
            for _ in range(2):
                assert not disk.try_flush()
                with pytest.raises(HostError, match="datasync"):
                    await disk.flush()
            assert not disk.try_write(0, b"more")
    assert Sync() not in file.changes
