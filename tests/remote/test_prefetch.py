"""Option ``prefetch=all``: what is fetched, in which order, and when it pauses and ends."""

from __future__ import annotations

import logging
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.neededunits import NeededUnits
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
from qedfuse.mount import prefetch
from qedfuse.mount.prefetch import Prefetch
from qedfuse.remote import cachespace
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.cachedirectory import CacheDirectory
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.remote.unitfile import UNIT_BYTES, UnitFile
from qedfuse.remote.unitstore import UnitStore
from qedfuse.tools.copying.warm import warm
from tests.remote.test_warm import make_image
from tests.support import qemu
from tests.support.remotes import PATIENT, some_bytes
from tests.support.webserver import serving, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from qedfuse.disk.disk import Disk
    from qedfuse.remote.fetcher import Fetcher
    from tests.support.webserver import WebServer

MIB = 1 << 20


@asynccontextmanager
async def opened_disk(
    url: str, cache: Path, deadlines: Deadlines = PATIENT
) -> AsyncIterator[tuple[Disk, Prefetch]]:
    """Open the disk of an image for the block, with the prefetch that a mount would run."""
    remote = RemoteOptions(cache_directory=str(cache), deadlines=deadlines)
    async with open_disk(url, OpenOptions(remote=remote)) as disk:
        yield disk, Prefetch([disk], "/mnt/vm1")


@pytest.fixture
async def image(tmp_path: Path) -> bytes:
    """Give an image with data, a range that was discarded, and data again."""
    path = make_image(tmp_path / "disk.qed")
    async with open_disk(str(path), OpenOptions(writable=True, compact="off")) as disk:
        await disk.discard(0, 6 * MIB)
    return await trio.Path(path).read_bytes()


@pytest.fixture
def server(image: bytes) -> Iterator[WebServer]:
    """Serve the image."""
    with serving(image) as server:
        yield server


def parts(disk: Disk) -> tuple[QedLayer, Fetcher]:
    """Return the first layer of a disk, which is an image on a server, and what fetches it."""
    layer = disk.chain.layers[0]
    assert isinstance(layer, QedLayer)
    assert isinstance(layer.file, RemoteFile)
    return layer, layer.file.fetcher


def units(server: WebServer) -> list[int]:
    """Return the units that were asked for, in the order of the requests."""
    asked: list[int] = []
    for first, last in server.requests:
        if last > first:  # an opening asks for the first byte
            asked += range(first // UNIT_BYTES, last // UNIT_BYTES + 1)
    return asked


async def test_tables_first_then_allocated_clusters(
    server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All tables are fetched before other units, each unit once, and no free cluster."""
    caplog.set_level(logging.INFO)
    async with opened_disk(server.url, tmp_path / "cache") as (disk, task):
        layer, fetcher = parts(disk)
        needed = NeededUnits(layer)
        needed.add_tables()
        tables = {unit for first, last in needed.runs(4) for unit in range(first, last + 1)}
        await needed.add_data()
        both = {unit for first, last in needed.runs(4) for unit in range(first, last + 1)}
        await trio.to_thread.run_sync(wait_until, lambda: not fetcher._flights)
        server.requests.clear()
        before = {unit for unit in both if fetcher.is_stored(unit, unit)}
        await task.run()
        asked = units(server)
        assert len(asked) == len(set(asked)) == len(both - before)
        assert set(asked) == both - before
        assert set(asked[: len(tables - before)]) == tables - before != set()
        assert 6 * MIB < needed.total_bytes < len(server.content) - 5 * MIB
        requests = len(server.requests)
        server.always = "status 404"
        assert await disk.read(40 * MIB, 6 * MIB) == some_bytes(24)[: 6 * MIB]
        assert len(server.requests) == requests
        assert not server.struck
    (record,) = caplog.records
    assert record.getMessage() == (
        f"/mnt/vm1: prefetch ended: all {needed.total_bytes} bytes that the disks can need are in "
        f"the cache (fetched since the mount began: {needed.total_bytes})"
    )


async def test_a_raw_base_is_fetched_whole(tmp_path: Path) -> None:
    """Of a chain all files on servers are fetched: clusters of an image, all of a raw file."""
    raw = some_bytes(9.5)
    overlay = qemu.create(tmp_path / "top.qed", 64 * MIB)
    with serving(raw) as server:
        qemu.run("qemu-img", "rebase", "-u", "-b", server.url, "-F", "raw", overlay)
        remote = RemoteOptions(
            cache_directory=str(tmp_path / "cache"), allowed=(parse_prefix(server.url),)
        )
        async with open_disk(str(overlay), OpenOptions(writable=True, remote=remote)) as disk:
            await Prefetch([disk], "/mnt").run()
            assert sorted(units(server)) == list(range(10))


async def test_no_request_while_a_reader_waits(server: WebServer, tmp_path: Path) -> None:
    """While a reader waits for the server, and shortly after that, no prefetch begins."""
    deadlines = Deadlines(5, 1, 30)
    async with opened_disk(server.url, tmp_path / "cache", deadlines) as (disk, task):
        layer, fetcher = parts(disk)
        asked = len(server.requests)
        server.faults = ["silence"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.read, 45 * MIB, 4096)
            await trio.to_thread.run_sync(wait_until, lambda: server.struck["silence"])
            assert fetcher.quiet_seconds() == 0
            nursery.start_soon(task.run)
        # The first request that was answered is the one of the reader, at its second attempt: it
        # needs the only table.
        first, last = server.requests[asked]
        assert first <= layer.l2_tables[0] <= last
        assert last - first < UNIT_BYTES
        assert len(server.requests) > asked + 1


async def test_the_end_of_the_mount_ends_it(
    server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prefetch that waits for a silent server ends, when cancelled and when files are closed."""
    caplog.set_level(logging.INFO)
    async with opened_disk(server.url, tmp_path / "cache") as (disk, task):
        server.always = "silence"
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task.run)
                await trio.to_thread.run_sync(wait_until, lambda: server.struck["silence"])
                nursery.cancel_scope.cancel()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task.run)
                await trio.testing.wait_all_tasks_blocked()
                disk.stop_fetching()
    assert not caplog.records


@pytest.mark.expect_log("what is not in the cache cannot be read")
@pytest.mark.expect_log("answers again")
async def test_it_goes_on_after_an_outage(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage the rest is fetched, and what was fetched before is not fetched again."""
    monkeypatch.setattr(prefetch, "_PAUSE_SECONDS", 0.01)
    async with opened_disk(server.url, tmp_path / "cache", Deadlines(1, 1, 0.1)) as (disk, task):
        server.healthy = 3
        server.always = "status 503"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run)
            await trio.to_thread.run_sync(wait_until, lambda: server.struck["status 503"] > 3)
            server.always = None
        asked = units(server)
        assert len(asked) == len(set(asked))
        needed = NeededUnits(disk.chain.layers[0])
        needed.add_tables()
        await needed.add_data()
        assert {unit for run in needed.runs(1) for unit in run} <= set(asked)


@pytest.mark.expect_log("what is not in the cache cannot be read")
@pytest.mark.expect_log("prefetch ended: http")
async def test_an_object_that_changes_ends_it(server: WebServer, tmp_path: Path) -> None:
    """If the object is replaced, the prefetch ends, and says so in one line."""
    async with opened_disk(server.url, tmp_path / "cache") as (_, task):
        asked = len(server.requests)
        server.etag = '"two"'
        with trio.fail_after(60):
            await task.run()
        assert len(server.requests) == asked


@pytest.mark.expect_log("cannot store in the cache")
@pytest.mark.expect_log("/mnt/vm1: prefetch ended: http")
async def test_a_full_cache_ends_it(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the cache has no more room, the prefetch ends, and says so in one line."""
    room = [4 * UNIT_BYTES]
    monkeypatch.setattr(CacheDirectory, "evict", lambda *_: room.pop() if room else 0)
    async with opened_disk(server.url, tmp_path / "cache") as (_, task):
        with trio.fail_after(60):
            await task.run()
    assert not room
    assert server.sent_bytes < len(server.content) - 8 * UNIT_BYTES


async def test_what_the_cache_has_is_not_read(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later mount neither fetches nor reads the data that the cache has, only the tables."""
    async with opened_disk(server.url, tmp_path / "cache") as (disk, task):
        await task.run()
        table = int(parts(disk)[0].l2_tables[0]) // UNIT_BYTES
    loaded: list[int] = []
    load = UnitFile.load

    def recorded(file: UnitFile, unit: int) -> bytes | None:
        loaded.append(unit)
        return load(file, unit)

    monkeypatch.setattr(UnitFile, "load", recorded)
    asked = server.sent_bytes
    async with opened_disk(server.url, tmp_path / "cache") as (disk, task):
        await task.run()
    assert table in loaded
    # The reader of the tables may have had some units fetched ahead.
    assert len(set(loaded)) < 10 < 6 * MIB // UNIT_BYTES
    assert server.sent_bytes == asked + 1  # the opening


@pytest.mark.expect_log("cannot store in the cache: older entries are still being removed")
async def test_room_that_is_being_made(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If making room in the cache takes long, the prefetch waits for it, and stores all."""
    monkeypatch.setattr(cachespace, "_MAX_WAIT_SECONDS", 0.01)
    making, made = threading.Event(), threading.Event()

    def evict(*_: object) -> int:
        if threading.current_thread().name == "qedfuse-evict":
            making.set()
            assert made.wait(20)
        return 1 << 30

    stored: list[bool] = []
    store_held = UnitStore.store_held

    def recorded(store: UnitStore, first: int, last: int) -> bool:
        stored.append(store_held(store, first, last))
        return stored[-1]

    monkeypatch.setattr(CacheDirectory, "evict", evict)
    monkeypatch.setattr(UnitStore, "store_held", recorded)
    async with opened_disk(server.url, tmp_path / "cache") as (disk, task):
        assert making.is_set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task.run)
            await trio.to_thread.run_sync(wait_until, lambda: False in stored)
            made.set()
        needed = NeededUnits(disk.chain.layers[0])
        needed.add_tables()
        await needed.add_data()
        fetcher = parts(disk)[1]
        assert all(fetcher.is_stored(first, last) for first, last in needed.runs(4))


@pytest.mark.parametrize("how", ["prefetch", "warm"])
async def test_the_end_waits_for_no_file_system(
    server: WebServer, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the cache's file system does not answer at the end, other tasks run, and Ctrl-C does.

    What is abandoned records nothing in an entry that is closed.
    """
    stalled, released, ended = threading.Event(), threading.Event(), threading.Event()
    mark = UnitStore.mark_usable_offline

    def stall(store: UnitStore, needed: bytes) -> bool:
        stalled.set()
        assert released.wait(20)
        assert not mark(store, needed)
        ended.set()
        return False

    monkeypatch.setattr(UnitStore, "mark_usable_offline", stall)
    cache = tmp_path / "cache"
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            if how == "warm":
                remote = RemoteOptions(cache_directory=str(cache), deadlines=PATIENT)
                nursery.start_soon(warm, server.url, OpenOptions(remote=remote))
            else:

                async def run() -> None:
                    async with opened_disk(server.url, cache) as (_, task):
                        await task.run()

                nursery.start_soon(run)
            await trio.to_thread.run_sync(stalled.wait, 20)
            scope.cancel()
    assert scope.cancelled_caught
    assert not ended.is_set()
    released.set()
    assert await trio.to_thread.run_sync(ended.wait, 20)


async def test_local_disks_need_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For a disk without remote files nothing is done, and nothing logged."""
    caplog.set_level(logging.INFO)
    path = make_image(tmp_path / "disk.qed")
    async with open_disk(str(path), OpenOptions()) as disk:
        await Prefetch([disk], "/mnt").run()
    assert not caplog.records


@pytest.mark.expect_log("prefetch ended")
async def test_a_refusal_at_the_end_does_not_end_the_mount(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the host refuses the thread that records the entry as usable offline, a line says so."""

    async def refuse(*_: object) -> None:
        msg = "cannot start a thread"
        raise HostError(msg)

    monkeypatch.setattr(prefetch, "mark_usable_offline", refuse)
    async with opened_disk(server.url, tmp_path / "cache") as (_disk, running):
        await running.run()
