"""Fetching: each unit once, neighbours together, demand first, no reader left waiting."""

from __future__ import annotations

import random
import threading
import time
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.errors import RemoteError
from qedfuse.remote import fetchthreads, recentfailures
from qedfuse.remote.fetcher import Fetcher
from qedfuse.remote.localdata import LocalData
from qedfuse.remote.readahead import ReadAhead
from qedfuse.remote.recentfailures import RecentFailures
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.remote.unitfile import UNIT_BYTES, UnitFile, make_files
from tests.support.remotes import HeldObject, fetching_threads, read, some_bytes
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

UNITS = 80
CONTENT = some_bytes(UNITS - 0.5)


@contextmanager
def fetching(
    directory: Path | None = None, content: bytes = CONTENT
) -> Iterator[tuple[HeldObject, Fetcher, RemoteFile]]:
    """Read a held object, with an entry of a cache in ``directory`` if one is given."""
    source = HeldObject(content)
    cache = local = None
    if directory is not None:
        if not (directory / "data").exists():
            make_files(str(directory), len(content))
        cache = UnitFile.open(str(directory), len(content))
        local = LocalData(cache)
    fetcher = Fetcher(source, cache)  # type: ignore[arg-type]
    file = RemoteFile(source, fetcher, local)  # type: ignore[arg-type]
    try:
        yield source, fetcher, file
    finally:
        file.close()


def unit_bytes(first: int, last: int | None = None) -> bytes:
    """Return the content of some adjacent units."""
    return CONTENT[first * UNIT_BYTES : ((first if last is None else last) + 1) * UNIT_BYTES]


def test_single_flight(tmp_path: Path) -> None:
    """All readers of a unit wait for one request."""
    with fetching(tmp_path) as (source, fetcher, file):
        source.held = {5}
        flights = [fetcher.demand(5, 5) for _ in range(20)]
        assert all(flight == flights[0] for flight in flights)
        source.release()
        for flight in flights:
            flight[0].wait_blocking()
        assert read(file, 5 * UNIT_BYTES, UNIT_BYTES) == unit_bytes(5)
        assert source.units() == [[5]]
        assert fetcher.requests == 1
        assert fetcher.fetched_bytes == UNIT_BYTES


def test_readers_in_threads_share_requests(tmp_path: Path) -> None:
    """Threads and tasks that read the same units concurrently cause one request for each."""
    with fetching(tmp_path) as (source, _, file):
        source.held = set(range(UNITS))
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.append(read(file, 0, 8 * UNIT_BYTES)))
            for _ in range(8)
        ]

        def asked() -> set[int]:
            return {unit for units in source.units() for unit in units}

        async def run() -> None:
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(check, number)
                await trio.testing.wait_all_tasks_blocked()
                for thread in threads:
                    thread.start()
                await trio.to_thread.run_sync(wait_until, lambda: asked() >= set(range(8)))
                source.release()

        async def check(number: int) -> None:
            with trio.CancelScope() as scope:
                if number % 2:
                    scope.cancel()
                data = await file.pread(UNIT_BYTES // 2, 4 * UNIT_BYTES)
                assert data == CONTENT[UNIT_BYTES // 2 :][: 4 * UNIT_BYTES]
            assert scope.cancelled_caught == bool(number % 2)

        trio.run(run)
        for thread in threads:
            thread.join(20)
        assert found == [unit_bytes(0, 7)] * 8
        units = [unit for units in source.units() for unit in units if unit < 8]
        assert sorted(units) == list(range(8))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 11])
def test_neighbours_are_joined(count: int, tmp_path: Path) -> None:
    """Adjacent units are fetched by requests of 1 MiB; only the last one may be shorter."""
    with fetching(tmp_path) as (source, fetcher, _):
        for flight in fetcher.demand(0, count - 1):
            flight.wait_blocking()
        requests = sorted(source.units())
        assert [unit for units in requests for unit in units] == list(range(count))
        assert all(len(units) == 4 for units in requests[:-1])
        assert all(length <= 1 << 20 for _, length in source.requests)


def test_cached_units_are_not_fetched_again(tmp_path: Path) -> None:
    """A request covers only what is missing, also in a later session."""
    with fetching(tmp_path) as (source, _, file):
        assert read(file, UNIT_BYTES, UNIT_BYTES) == unit_bytes(1)
    with fetching(tmp_path) as (source, _, file):
        assert read(file, 0, 3 * UNIT_BYTES) == unit_bytes(0, 2)
        assert sum(length for _, length in source.requests) <= 3 * UNIT_BYTES
    with fetching(tmp_path) as (source, _, file):
        assert read(file, 0, 3 * UNIT_BYTES) == unit_bytes(0, 2)
        assert [units for units in source.units() if units[0] < 3] == []


def test_window_of_a_sequential_reader() -> None:
    """The window grows while units are read in order, up to the maximum, and not within a unit."""
    readers = ReadAhead()
    windows = [readers.record_read(unit, unit, 32) for unit in (0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8)]
    assert windows == [0, 0, 1, 1, 1, 2, 4, 8, 16, 32, 32, 32]
    # Two other readers do not disturb it.
    assert readers.record_read(1000, 1000, 32) == 0
    assert readers.record_read(2000, 2003, 32) == 0
    assert readers.record_read(9, 9, 32) == 32
    assert readers.record_read(2004, 2004, 32) == 1


def test_reads_of_a_sequential_reader_in_another_order() -> None:
    """Reads that the kernel has in flight may arrive in any order; others begin anew."""
    readers = ReadAhead()
    windows = [readers.record_read(unit, unit + 1, 32) for unit in (0, 2, 4, 8, 6, 10, 14, 12)]
    assert windows == [0, 1, 2, 4, 4, 8, 16, 16]
    assert readers.set_marker(16, 31) == 23
    assert readers.record_read(40, 40, 32) == 0
    # Only the marked unit, and the one after the end, show how far the reader has come.
    assert readers.record_read(28, 28, 32) == 0
    assert readers.record_read(22, 23, 32) == 32
    assert readers.record_read(32, 32, 32) == 32


def test_window_of_a_reader_at_the_start_after_a_random_read() -> None:
    """A read of unit 0 begins a reader of its own: nothing was fetched ahead of the other one."""
    readers = ReadAhead()
    assert readers.record_read(100, 100, 32) == 0
    assert [readers.record_read(unit, unit, 32) for unit in (0, 1, 2, 3)] == [0, 1, 2, 4]
    assert readers.record_read(101, 101, 32) == 1


def test_no_window_for_random_reads() -> None:
    """Reads in no order have no window."""
    readers = ReadAhead()
    units = list(range(0, 1000, 3))
    random.Random(1).shuffle(units)
    assert {readers.record_read(unit, unit, 32) for unit in units} == {0}


def test_fetched_ahead_of_a_sequential_reader(tmp_path: Path) -> None:
    """Units are fetched ahead of a sequential reader, each once, and of a random one none."""
    with fetching(tmp_path) as (source, _, file):
        for unit in range(12):
            assert read(file, unit * UNIT_BYTES, 4096) == unit_bytes(unit)[:4096]
        wait_until(lambda: max(unit for units in source.units() for unit in units) >= 20)
        asked = [unit for units in source.units() for unit in units]
        assert len(asked) == len(set(asked))
        assert len(source.requests) < len(asked) / 2
    other = tmp_path / "other"
    other.mkdir()
    with fetching(other) as (source, _, file):
        for unit in (40, 7, 60, 21, 3, 50):
            assert read(file, unit * UNIT_BYTES, 4096) == unit_bytes(unit)[:4096]
        assert source.units() == [[40], [7], [60], [21], [3], [50]]


def test_reads_of_cached_units_fetch_ahead(tmp_path: Path) -> None:
    """A sequential reader that finds its units ready has the next ones fetched as well."""
    with fetching(tmp_path) as (_, fetcher, file):
        assert read(file, 0, 8 * UNIT_BYTES) == unit_bytes(0, 7)
        view = memoryview(bytearray(4096))
        for unit in range(8):
            wait_until(lambda unit=unit: file.try_read(unit * UNIT_BYTES, view))
            assert bytes(view) == unit_bytes(unit)[:4096]
        wait_until(lambda: fetcher.is_stored(8, 9))


def test_demand_does_not_wait_for_prefetches(tmp_path: Path) -> None:
    """While the prefetches that may run hang, a reader's unit is fetched, also a queued one."""
    with fetching(tmp_path) as (source, fetcher, file):
        source.held = set(range(20, 36))
        fetcher.prefetch(20, 79)
        wait_until(lambda: len(source.requests) == 4)
        assert read(file, 3 * UNIT_BYTES, UNIT_BYTES) == unit_bytes(3)
        assert read(file, 70 * UNIT_BYTES, UNIT_BYTES) == unit_bytes(70)
        assert len(source.requests) == 6  # no further prefetch has begun
        source.release()
        wait_until(lambda: all(fetcher.ready[20:]))


class Lasting(dict[int, BaseException]):
    """Errors for `HeldObject.errors` that are raised again and again."""

    def pop(self, unit: int) -> BaseException:  # type: ignore[override]
        """Return the error for a unit."""
        return self[unit]


async def give_up(file: RemoteFile, units: Iterable[int], until: Callable[[], bool]) -> None:
    """Read units in one task each until a condition holds, and cancel the tasks."""
    async with trio.open_nursery() as nursery:
        for unit in units:
            nursery.start_soon(file.pread, unit * UNIT_BYTES, 10)
        await trio.to_thread.run_sync(wait_until, until)
        nursery.cancel_scope.cancel()


def test_units_of_readers_that_have_given_up_are_not_fetched(tmp_path: Path) -> None:
    """Of the reads that were cancelled, only those are fetched whose requests had begun.

    The unit of a later reader is fetched first, and a unit that was prefetched is fetched last.
    """
    with fetching(tmp_path) as (source, fetcher, file):
        source.held = set(range(4, UNITS))
        running = [fetcher.demand(unit, unit) for unit in range(4, 36, 2)]
        wait_until(lambda: len(source.requests) == 16)
        fetcher.prefetch(70, 70)
        trio.run(give_up, file, range(40, 72, 2), lambda: len(fetcher._threads._fetches) == 16)
        assert not any(flight.readers for flight in fetcher._flights.values() if flight.first >= 40)
        last = fetcher.demand(3, 3)
        assert len(source.requests) == 16
        source.release(kept=range(6, 36))  # one request ends, so the next ones begin in order
        last[0].wait_blocking()
        wait_until(lambda: fetcher.ready[70])
        assert source.units()[16:] == [[3], [70]]
        source.release()
        for flight in running:
            flight[0].wait_blocking()
        assert read(file, 50 * UNIT_BYTES, 10) == unit_bytes(50)[:10]


@pytest.mark.expect_log("what is not in the cache")
@pytest.mark.expect_log("answers again")
@pytest.mark.parametrize("first", ["prefetch", "reader that has given up"])
def test_a_late_reader_of_a_request_that_fails_has_a_request_of_its_own(
    first: str, tmp_path: Path
) -> None:
    """A reader that joins a running request that no reader waits for gets its own whole time.

    So if the request fails, another one is made; if that fails, the reader fails.
    """
    with fetching(tmp_path) as (source, fetcher, file):
        cases: list[tuple[int, dict[int, BaseException]]] = [
            (20, {20: RemoteError("out")}),
            (50, Lasting({50: RemoteError("out")})),
        ]
        for unit, errors in cases:
            source.held, source.errors, before = {unit}, errors, len(source.requests)

            def has_begun(requests: int = len(source.requests) + 1) -> bool:
                return len(source.requests) == requests

            if first == "prefetch":
                fetcher.prefetch(unit, unit)
                wait_until(has_begun)
            else:
                trio.run(give_up, file, [unit], has_begun)
            flight = fetcher.demand(unit, unit)[0]
            source.release()
            if isinstance(errors, Lasting):
                with pytest.raises(RemoteError, match="out"):
                    flight.wait_blocking()
            else:
                flight.wait_blocking()
                assert bytes(flight.blocks[unit]) == unit_bytes(unit)
            assert len(source.requests) == before + 2
        source.errors = {}
        assert read(file, 0, 10) == CONTENT[:10]


def test_cached_units_are_read_while_all_fetches_hang(tmp_path: Path) -> None:
    """While 16 requests hang and more wait, units of the cache are looked up and read."""
    with fetching(tmp_path) as (_, _, file):
        assert read(file, 0, 4 * UNIT_BYTES) == unit_bytes(0, 3)
    with fetching(tmp_path) as (source, fetcher, file):
        source.held = set(range(10, UNITS))
        for unit in range(10, UNITS, 2):
            fetcher.demand(unit, unit)
        wait_until(lambda: len(source.requests) == 16)
        assert read(file, 0, 4 * UNIT_BYTES) == unit_bytes(0, 3)
        assert trio.run(file.pread, 100, UNIT_BYTES) == CONTENT[100:][:UNIT_BYTES]
        assert len(source.requests) == 16
        source.release()


def test_close_while_requests_hang(tmp_path: Path) -> None:
    """Close returns while requests hang; their readers fail then, and later reads fail as well."""
    with fetching(tmp_path) as (source, fetcher, file):
        source.held = {0, 2, 4}
        flights = [flight for unit in (0, 2, 4) for flight in fetcher.demand(unit, unit)]
        wait_until(lambda: len(source.requests) == 3)
        source.ignores_close = True
        file.close()
        for flight in flights:
            with pytest.raises(RemoteError, match="closed"):
                flight.wait_blocking()
        with pytest.raises(RemoteError, match="closed"):
            read(file, 0, 10)
        with pytest.raises(RemoteError, match="closed"):
            fetcher.prefetch(0, 1)
        assert not file.try_read(0, memoryview(bytearray(10)))
        source.release()


@pytest.mark.expect_log("cannot be fetched")
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(), ValueError()])
def test_no_reader_waits_for_a_thread_that_fails(error: BaseException, tmp_path: Path) -> None:
    """Whatever is raised in a thread, its readers fail, and the unit can be read afterwards."""
    with fetching(tmp_path) as (source, _, file):
        source.errors = {1: error}
        with pytest.raises(RemoteError, match=type(error).__name__):
            read(file, UNIT_BYTES, 10)
        assert not source.errors
        assert read(file, UNIT_BYTES, 10) == unit_bytes(1)[:10]


@pytest.mark.expect_log("cannot be fetched")
def test_no_reader_waits_for_a_look_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look into the cache that raises fails its readers, and later reads work."""
    with fetching(tmp_path) as (_, _, file):
        with monkeypatch.context() as context:
            context.setattr(UnitFile, "has_any", lambda *_: 1 / 0)
            with pytest.raises(RemoteError, match="ZeroDivisionError"):
                read(file, 0, 10)
        assert read(file, 0, 10) == CONTENT[:10]


@pytest.mark.expect_log("cannot start a thread: found none; trying again")
def test_no_thread_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the host has no thread, a read waits for a bounded time, in a thread or a task."""
    real, failed = threading.Thread.start, 0

    def start(thread: threading.Thread) -> None:
        nonlocal failed
        if thread.name == "qedfuse-fetch" and failed < fails:
            failed += 1
            msg = "found none"
            raise RuntimeError(msg)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(fetchthreads, "_IDLE_SECONDS", 0.0)
    with fetching(tmp_path) as (_, _, file):
        for unit, fails in enumerate((3, 6)):
            if unit:
                found = bytes(trio.run(file.pread, unit * UNIT_BYTES, 10))
            else:
                found = read(file, unit * UNIT_BYTES, 10)
            assert found == unit_bytes(unit)[:10]
            assert failed == fails
            wait_until(lambda: not fetching_threads())
        assert len(caplog.records) == 2
        monkeypatch.setattr(HeldObject, "max_seconds", 0.05)
        fails = 1000
        with pytest.raises(RemoteError, match="found no answer within"):
            read(file, (UNITS - 1) * UNIT_BYTES, 10)  # not read ahead


def test_idle_threads_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that have nothing to do end; the next read starts others.  There are at most 20."""
    monkeypatch.setattr(fetchthreads, "_IDLE_SECONDS", 0.01)
    with fetching(tmp_path) as (source, fetcher, file):
        for _ in range(3):
            source.held = set(range(UNITS))
            flights = [f for unit in range(0, UNITS, 2) for f in fetcher.demand(unit, unit)]
            assert 0 < len(fetching_threads()) <= 20
            source.release()
            for flight in flights:
                flight.wait_blocking()
            wait_until(lambda: not fetching_threads())
            fetcher.ready[:] = bytes(UNITS)
        assert read(file, 0, len(CONTENT)) == CONTENT


def test_readers_wait_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader, thread or task, gives up on a request that hangs; later readers get its bytes.

    Those that come after one that has given up wait as for a brief request.
    """
    monkeypatch.setattr(HeldObject, "max_seconds", 0.05)
    monkeypatch.setattr(HeldObject, "max_brief_seconds", 0.7)
    with fetching(tmp_path) as (source, fetcher, file):
        source.held = {0}
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"held\.qed: found no answer within 0 s"):
            read(file, 0, 10)
        with pytest.raises(RemoteError, match="found no answer within 1 s"):
            trio.run(file.pread, 0, 10)
        with pytest.raises(RemoteError, match="found no answer within 1 s"):
            read(file, 0, 10)
        assert time.monotonic() - begin < 60
        assert len(source.requests) == 1
        source.release()
        wait_until(lambda: fetcher.ready[0])
        assert read(file, 0, 10) == CONTENT[:10]
        assert len(source.requests) == 1


class _Clock:
    """Replaces the module ``time``."""

    now = 100.0

    def monotonic(self) -> float:
        """Return the time that the test has set."""
        return self.now


@pytest.mark.expect_log("what is not in the cache")
@pytest.mark.expect_log("answers again")
def test_after_a_failure_the_next_request_is_brief(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that a reader could not read is asked for briefly within a second, other units not.

    The second begins anew with each failure.  Bytes that the server gives are read in each case.
    """
    clock = _Clock()
    monkeypatch.setattr(recentfailures, "time", clock)
    with fetching(tmp_path) as (source, _, file):

        def brief_requests(unit: int, *, fails: bool) -> int:
            before = source.brief_requests
            if fails:
                source.errors[unit] = RemoteError("out")
                with pytest.raises(RemoteError, match="out"):
                    read(file, unit * UNIT_BYTES, 10)
            else:
                assert read(file, unit * UNIT_BYTES, 10) == unit_bytes(unit)[:10]
            assert not source.errors
            return source.brief_requests - before

        assert brief_requests(10, fails=True) == 0
        assert brief_requests(20, fails=True) == 0
        clock.now += 0.9
        assert brief_requests(10, fails=True) == 1
        clock.now += 0.2
        assert brief_requests(20, fails=True) == 0
        assert brief_requests(30, fails=False) == 0
        assert brief_requests(10, fails=False) == 1
        clock.now += 1.1
        assert brief_requests(20, fails=False) == 0


def test_readers_without_a_pause_wait_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that fails again and again counts for three seconds, and then no longer."""
    clock = _Clock()
    monkeypatch.setattr(recentfailures, "time", clock)
    failures = RecentFailures()
    recent = []
    for _ in range(12):
        recent.append(failures.has_any(5, 5))
        failures.record(5, 5)
        clock.now += 0.5
    assert recent == [False, *[True] * 6, *[False] * 5]
    clock.now += 2
    failures.record(5, 5)
    assert failures.has_any(5, 5)


def test_failures_of_long_ago_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the failures of the last second are kept, in the order of time."""
    clock = _Clock()
    monkeypatch.setattr(recentfailures, "time", clock)
    failures = RecentFailures()
    for first in [*range(0, 40, 4), 4, 0]:
        failures.record(first, first + 3)
        clock.now += 0.3
    assert {unit for unit in range(50) if failures.has_any(unit, unit)} == {
        *range(8),
        *range(36, 40),
    }
    assert failures.has_any(7, 100)
    assert not failures.has_any(8, 35)
    assert len(failures._times) <= 16


def test_held_blocks_are_bounded() -> None:
    """Without a cache, at most 16 MiB of fetched units are held, and each for itself."""
    content = some_bytes(200)
    tracemalloc.start()
    try:
        with fetching(None, content) as (_, fetcher, file):
            before = tracemalloc.get_traced_memory()[0]
            for offset in range(0, len(content), UNIT_BYTES):
                assert read(file, offset, UNIT_BYTES) == content[offset : offset + UNIT_BYTES]
            held = fetcher._store._held
            assert 0 < sum(len(block) for block in held.values()) <= 16 << 20
            assert all(isinstance(block, bytes) for block in held.values())
            # The held units, prefetches that run, and the buffers of this test.
            assert tracemalloc.get_traced_memory()[0] - before < 24 << 20
    finally:
        tracemalloc.stop()


def test_without_a_cache_readers_share_held_units() -> None:
    """Without a cache, a unit that was read a moment ago is not fetched again."""
    with fetching() as (source, _, file):
        for _ in range(3):
            assert read(file, 10 * UNIT_BYTES, UNIT_BYTES) == unit_bytes(10)
        assert source.units() == [[10]]


def test_an_outage_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An outage is one line in the log, and its end is another."""
    with fetching(tmp_path) as (source, _, file):
        for unit in (1, 11, 21):
            source.errors[unit] = RemoteError("out")
            with pytest.raises(RemoteError, match="out"):
                read(file, unit * UNIT_BYTES, 10)
        assert read(file, 0, 10) == CONTENT[:10]
        assert read(file, 31 * UNIT_BYTES, 10) == unit_bytes(31)[:10]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].endswith("what is not in the cache cannot be read")
    assert lines[1].endswith("answers again")


test_an_outage_is_logged_once = pytest.mark.expect_log("answers again")(
    pytest.mark.expect_log("what is not in the cache")(test_an_outage_is_logged_once)
)


def test_random_readers_see_right_bytes(tmp_path: Path) -> None:
    """Threads that read ranges at random, beside prefetches and failures, see right bytes only."""
    generator = random.Random(3)
    with fetching(tmp_path) as (source, fetcher, file):
        wrong: list[tuple[int, int]] = []

        def run(seed: int) -> None:
            mine = random.Random(seed)
            for _ in range(60):
                offset = mine.randrange(len(CONTENT))
                length = mine.randrange(1, 3 * UNIT_BYTES)
                try:
                    if read(file, offset, length) != CONTENT[offset : offset + length]:
                        wrong.append((offset, length))
                except RemoteError:
                    pass

        source.errors = {unit: RemoteError("out") for unit in generator.sample(range(UNITS), 20)}
        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        fetcher.prefetch(30, 60)
        for thread in threads:
            thread.join(60)
        assert not wrong


test_random_readers_see_right_bytes = pytest.mark.expect_log("what is not in the cache")(
    pytest.mark.expect_log("answers again")(test_random_readers_see_right_bytes)
)
