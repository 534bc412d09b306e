"""Fills: writes that need a server fail soon while it is silent, and only then."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

import pytest
import trio
import trio.testing

from qedfuse.disk.datapath.basecontent import BaseContent
from qedfuse.errors import ObjectChangedError, RemoteError
from qedfuse.hostio import serversilence
from qedfuse.hostio.readonlyfile import ReadOnlyFile
from qedfuse.hostio.serversilence import ServerSilence

if TYPE_CHECKING:
    from qedfuse.disk.lookup.chain import Chain

ATTEMPT = 10.0
WHOLE = 60.0
BATCH = 64
"""How many writes the kernel sends at a time."""


class _Clock:
    """Replaces the module ``time``."""

    @staticmethod
    def monotonic() -> float:
        """Return the time of the event loop."""
        return trio.current_time()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let silences use the clock of the event loop."""
    monkeypatch.setattr(serversilence, "time", _Clock)


class Server(ReadOnlyFile):
    """A file on a server, with 16 requests at a time."""

    path = ""

    def __init__(self, name: str = "server") -> None:
        """Make a server that fails with a `RemoteError` in the end."""
        super().__init__(name)
        self.silent = ServerSilence(ATTEMPT)
        self.delay = WHOLE
        self.error: RemoteError | None = RemoteError(f"{name}: silent")
        self.is_cached = False
        self.requests = trio.CapacityLimiter(16)

    @property
    def silence(self) -> ServerSilence:
        """The silence."""
        return self.silent

    def size(self) -> int:
        """Return a length."""
        return 1 << 30

    async def pread_into(self, _offset: int, view: memoryview) -> int:
        """Wait; then fail or answer."""
        with self.silent.waiting(lambda: not self.is_cached):
            if self.is_cached:
                await trio.sleep(self.delay)
                return len(view)
            with trio.move_on_after(WHOLE + 1) as scope:
                async with self.requests:
                    await trio.sleep(self.delay)
            if self.error is not None and not scope.cancelled_caught:
                raise self.error.again()
            if scope.cancelled_caught:
                msg = "too late"
                raise RemoteError(msg)
            self.silent.answered()
            return len(view)


class _Layer:
    def __init__(self, file: ReadOnlyFile | None) -> None:
        self.file = file


class _Chain:
    """A chain whose layer at a depth has the bytes at that guest offset."""

    def __init__(self, *files: ReadOnlyFile) -> None:
        self.layers = [_Layer(file) for file in (None, *files)]

    async def read(self, start: int, length: int, depth: int) -> bytearray:
        assert depth == 1
        file = self.layers[start].file
        assert file is not None
        return cast("bytearray", await file.pread(0, length))


def content_of(*files: ReadOnlyFile) -> BaseContent:
    """Return the content of bases; a fill at guest offset n reads the file number n, from 1 on."""
    return BaseContent(cast("Chain", _Chain(*files)))


async def batch(content: BaseContent, depth: int = 1, count: int = BATCH) -> Counter[str]:
    """Fill concurrently; return how often each error was raised ("" for none)."""
    found: Counter[str] = Counter()

    async def fill() -> None:
        try:
            assert len(await content.read(depth, 10)) == 10
        except RemoteError as error:
            found[str(error)] += 1
        else:
            found[""] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(fill)
    return found


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """Give a clock that passes without waiting."""
    return trio.testing.MockClock(autojump_threshold=0)


def test_fills_of_a_silent_server_wait_for_the_whole_time_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The first batch waits for the time limit, the second for one attempt, others for a second.

    A fill that comes later than a second after the last failure has the whole time again.
    """

    async def run() -> list[float]:
        server = Server()
        content, spent = content_of(server), []
        for pause in (0, 0, 0, 0.9, 1.1):
            await trio.sleep(pause)
            begin = trio.current_time()
            found = await batch(content, count=16)
            assert found == {"server: silent": 16}
            spent.append(trio.current_time() - begin)
        return spent

    spent = trio.run(run, clock=autojump_clock)
    assert spent == pytest.approx([WHOLE, ATTEMPT, 1, 1, WHOLE], abs=0.5)


@pytest.mark.parametrize("delay", [0.5, 3.0, 9.0])
def test_fills_of_a_slow_server_after_a_failure_succeed(
    delay: float, autojump_clock: trio.testing.MockClock
) -> None:
    """After a failure, a server that answers slowly loses no write, in no batch."""

    async def run() -> None:
        server = Server()
        content, server.delay = content_of(server), 0
        assert await batch(content, count=1) == {"server: silent": 1}
        assert server.silent.is_recent
        server.error, server.delay = None, delay
        for _ in range(4):
            assert await batch(content) == {"": BATCH}
        assert not server.silent.is_recent

    trio.run(run, clock=autojump_clock)


def test_fills_that_need_no_silent_server_have_their_whole_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A fill from the cache, or from another server, is not limited by the silence of a server.

    The error of each fill is that of its own server, of the same class.
    """

    async def run() -> None:
        silent, other = Server(), Server("other")
        content = content_of(silent, other)
        silent.error = ObjectChangedError("silent: changed")
        await batch(content, count=1)
        assert silent.silent.is_recent
        other.delay = 50
        other.error = None
        assert await batch(content, 2, 16) == {"": 16}
        silent.delay = 0
        await batch(content, count=1)
        silent.is_cached, silent.delay = True, 50
        assert silent.silent.is_recent
        assert await batch(content, 1, 4) == {"": 4}
        silent.is_cached, silent.delay = False, 0
        await batch(content, count=1)
        silent.delay = WHOLE
        with pytest.raises(ObjectChangedError, match="silent: changed"):
            await content.read(1, 10)

    trio.run(run, clock=autojump_clock)


def test_a_failure_is_remembered_without_its_frames(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The error that a silence keeps has no traceback, whose frames would keep buffers."""

    async def run() -> None:
        server = Server()
        await batch(content_of(server), count=1)
        failure = server.silent._failure
        assert failure is not None
        assert failure.__traceback__ is None

    trio.run(run, clock=autojump_clock)
