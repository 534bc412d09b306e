"""Concurrent requests for one key share one fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.errors import ForeignError, HostError, ObjectChangedError, RemoteError
from qedfuse.hostio.imagefile import read_header
from qedfuse.util.singleflight import SingleFlight
from tests.support.disks import build_image
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from trio.testing import MockClock

SILENT_SECONDS: Final = 60.0


async def test_askers_share_one_fetch() -> None:
    """A request during a fetch of the same key waits for it and does not fetch."""
    flights: SingleFlight[str] = SingleFlight()
    go = trio.Event()
    fetched = 0
    leaders: list[bool] = []

    async def fetch() -> None:
        nonlocal fetched
        fetched += 1
        await go.wait()

    async def ask() -> None:
        leaders.append(await flights.run("key", fetch))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert fetched == 1
        go.set()
    assert sorted(leaders) == [False] * 4 + [True]


async def test_other_keys_do_not_wait() -> None:
    """Fetches of different keys run concurrently."""
    flights: SingleFlight[int] = SingleFlight()
    go = trio.Event()
    running = 0

    async def fetch() -> None:
        nonlocal running
        running += 1
        await go.wait()

    async with trio.open_nursery() as nursery:
        for key in range(3):
            nursery.start_soon(flights.run, key, fetch)
        await wait_all_tasks_blocked()
        assert running == 3
        go.set()


async def test_next_asker_fetches_again() -> None:
    """A request after the end of a fetch fetches again."""
    flights: SingleFlight[str] = SingleFlight()
    fetched = 0

    async def fetch() -> None:
        nonlocal fetched
        fetched += 1

    assert await flights.run("key", fetch)
    assert await flights.run("key", fetch)
    assert fetched == 2


async def test_error_is_the_leader_s_alone() -> None:
    """Tasks that waited for a failed fetch look again; they get its error only from a server."""
    flights: SingleFlight[str] = SingleFlight()
    go = trio.Event()
    waited: list[bool] = []

    async def fail() -> None:
        await go.wait()
        raise LookupError

    async def lead() -> None:
        with pytest.raises(LookupError):
            await flights.run("key", fail)

    async def follow() -> None:
        waited.append(await flights.run("key", fail))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lead)
        await wait_all_tasks_blocked()
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        go.set()
    assert waited == [False]


async def test_cancelled_leader_wakes_the_others() -> None:
    """A cancelled fetch wakes the tasks that wait for it."""
    flights: SingleFlight[str] = SingleFlight()
    outcome: list[bool] = []

    async def follow() -> None:
        outcome.append(await flights.run("key", trio.sleep_forever))

    async with trio.open_nursery() as nursery, trio.open_nursery() as inner:
        inner.start_soon(flights.run, "key", trio.sleep_forever)
        await wait_all_tasks_blocked()
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
    assert outcome == [False]


@pytest.mark.parametrize("kind", [RemoteError, ObjectChangedError, ForeignError])
async def test_error_of_a_server_is_for_all_who_wait(kind: type[HostError]) -> None:
    """An error of a server ends the wait of all; each gets an error of its own."""
    flights: SingleFlight[str] = SingleFlight()
    errors: list[HostError] = []
    fetched = 0

    async def fail() -> None:
        nonlocal fetched
        fetched += 1
        await wait_all_tasks_blocked()
        raise kind(str(fetched))

    async def ask() -> None:
        with pytest.raises(kind) as caught:
            await flights.run("key", fail)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert fetched == 1
    assert len({id(error) for error in errors}) == 5
    await ask()
    assert fetched == 2


class _SilentFile(MemoryFile):
    """A base whose server answers nothing: reads fail after `SILENT_SECONDS`."""

    is_silent = False

    async def pread(self, offset: int, length: int) -> bytes:
        """Return the content, or fail."""
        if self.is_silent:
            await trio.sleep(SILENT_SECONDS)
            raise RemoteError(self.name)
        return await super().pread(offset, length)


@pytest.mark.parametrize("is_top", [True, False])
async def test_readers_of_a_slice_wait_together(is_top: bool, autojump_clock: MockClock) -> None:  # noqa: FBT001  a parameter
    """Readers of one slice whose server is silent all fail when the first one does.

    The slice is one of the image itself, or of its base.
    """
    file = _SilentFile(build_image(1 << 20, {n: bytes(4096) for n in range(30)}), writable=False)
    store = make_store(1 << 20)
    layer = QedLayer(file, await read_header(file), store)
    await layer.scan_l1()
    top = MemoryFile(build_image(1 << 20, backing=b"base"))
    above = QedLayer(top, await read_header(top), store)
    await above.scan_l1()
    layers = [above, layer]
    chain = Chain([layer]) if is_top else Chain(layers, FlattenedBacking(layers, above, store))
    failed = 0

    async def read_one(number: int) -> None:
        nonlocal failed
        with pytest.raises(RemoteError):
            await chain.read(number * 4096, 512)
        failed += 1

    file.is_silent = True
    begin = autojump_clock.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(read_one, number)
    assert failed == 20
    assert autojump_clock.current_time() - begin == pytest.approx(SILENT_SECONDS)
    file.is_silent = False
    assert await chain.read(4096, 512) == bytes(512)
