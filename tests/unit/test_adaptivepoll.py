"""The adaptive poll for kernel requests and for the host's disk, which polls only if that pays."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.errors import HostError
from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE
from qedfuse.hostio.nowaitretry import MAX_RETRY_SECONDS, NowaitRetry
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.util.adaptivepoll import AdaptivePoll
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _calls_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls in threads of Python: only their reads are retried, and tests replace them."""
    monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")


def test_polling_begins_when_it_would_have_paid_and_ends_when_it_does_not() -> None:
    """A short wait raises the confidence, a long one lowers it; at 0 there is no polling."""
    poll = AdaptivePoll(1.0)
    assert poll.seconds == 0
    poll.record(1.0, slept=True)
    assert poll.seconds == 1
    for _ in range(100):
        poll.record(0.5, slept=False)
    late = 0
    while poll.seconds:
        poll.record(5.0, slept=True)
        late += 1
    assert 8 <= late <= 32
    poll.record(1.0, slept=True)
    assert poll.seconds == 1
    poll.record(10.0, slept=True)
    assert poll.seconds == 0, "something else is going on"
    poll.record(3.0, slept=True)
    assert poll.seconds == 0
    assert AdaptivePoll(1.0, start_enabled=True).seconds == 1
    never = AdaptivePoll(0.0, start_enabled=True)
    never.record(0.0, slept=False)
    assert never.seconds == 0


class Host:
    """A disk that needs ``seconds`` for each read.

    Each try moves the clock by a tenth of the longest poll.
    """

    def __init__(self, seconds: float) -> None:
        """Start at 0."""
        self.now = 0.0
        self.since = 0.0
        self.seconds = seconds
        self.slept = self.tried = 0

    def clock(self) -> float:
        """Return the time in seconds."""
        return self.now

    def ready(self) -> bool:
        """Return whether the data is there."""
        assert loop_load().polled_reads == 1
        self.tried += 1
        self.now += MAX_RETRY_SECONDS / 10
        return self.now >= self.since + self.seconds

    async def sleep(self) -> None:
        """Wait for it in another way."""
        assert loop_load().polled_reads == 0
        self.slept += 1
        self.now = max(self.now, self.since + self.seconds)

    async def read(self, retry: NowaitRetry) -> None:
        """Read once."""
        self.since = self.now
        await retry.wait(self.ready, self.sleep)


async def test_a_fast_disk_is_polled_and_a_slow_one_is_not() -> None:
    """A fast disk is polled, a slow one is not, and one that becomes fast is polled again."""
    host = Host(MAX_RETRY_SECONDS / 2)
    retry = NowaitRetry(host.clock)
    for _ in range(50):
        await host.read(retry)
    tried = host.tried
    assert (host.slept, tried // 50) == (0, 5)
    async with trio.to_thread.current_default_thread_limiter():
        await host.read(retry)
        assert (host.slept, host.tried) == (1, tried), (
            "a thread is at work and needs the loop asleep"
        )
    host.slept = 0
    host.seconds = 20 * MAX_RETRY_SECONDS
    for _ in range(100):
        await host.read(retry)
    assert host.slept == 100
    vain = host.tried - tried
    assert vain <= 320, "it goes on polling for what does not come"
    host.seconds = MAX_RETRY_SECONDS / 2
    for _ in range(10):
        await host.read(retry)
    assert host.slept <= 102


async def test_others_run_while_a_read_is_polled_for() -> None:
    """Other tasks run before each new try of a polled read."""
    host, turns = Host(MAX_RETRY_SECONDS / 2), 0

    async def others() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        await host.read(NowaitRetry(host.clock))
        nursery.cancel_scope.cancel()
    assert 3 <= turns <= 7


@pytest.mark.parametrize("seed", range(10))
async def test_reads_that_wait_together_are_tried_in_order(seed: int) -> None:
    """One task tries all waiting reads in order, and each one completes or goes to a thread."""
    chance = random.Random(seed)
    now = 0.0
    ends: dict[int, float] = {}
    ended: dict[int, str] = {}

    async def read(number: int, seconds: float) -> None:
        due = now + seconds

        def ready() -> bool:
            nonlocal now
            older = list(ends)[: list(ends).index(number)]
            assert all(one in ended or ends[one] <= now for one in older), "not its turn"
            now += MAX_RETRY_SECONDS / 50
            if now >= due:
                ended[number] = "came"
            return now >= due

        async def sleep() -> None:
            assert now >= ends[number]
            await trio.lowlevel.checkpoint()
            ended[number] = "slept"

        ends[number] = now + MAX_RETRY_SECONDS
        await NowaitRetry(lambda: now).wait(ready, sleep)

    async with trio.open_nursery() as nursery:
        for number in range(40):
            slow = chance.random() < 0.2
            nursery.start_soon(
                read, number, MAX_RETRY_SECONDS * (3 if slow else chance.random() / 2)
            )
            if chance.random() < 0.3:
                await trio.lowlevel.checkpoint()
    assert sorted(ended) == list(range(40))
    assert len(set(ended.values())) == 2
    assert loop_load().polled_reads == 0
    await read(99, MAX_RETRY_SECONDS / 2)
    assert ended[99] == "came", "the queue works on"


async def test_a_host_file_that_is_not_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of uncached bytes returns all of them, by whichever way it waits."""
    content = os.urandom(300_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    real, refused = os.preadv, 0

    def preadv(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        """Refuse the first tries of each read, as if the disk were slow."""
        nonlocal refused
        if flags == os.RWF_NOWAIT and refused < misses:
            refused += 1
            raise BlockingIOError(errno.EAGAIN, "not yet")
        return real(fd, buffers, offset, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    file = PosixFile.open(str(path))
    try:
        for misses in (0, 1, 5, 1 << 30):
            refused = 0
            assert await file.pread(1000, 5000) == content[1000:6000]
            assert await file.pread(299_000, 5000) == content[299_000:]
            view = memoryview(bytearray(50))
            assert file.try_read(100, view) is (refused >= misses)
            assert view == (content[100:150] if refused >= misses else bytes(50))
    finally:
        file.close()


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_datasync_goes_to_a_thread_if_the_last_was_slow_or_a_task_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, wanted: bool
) -> None:
    """A datasync is inline, unless the last one was slow or another task waits."""
    path = tmp_path / "file"
    path.touch()
    threads: list[bool] = []
    now = 0.0
    seconds = 1e-4

    def fdatasync(_fd: int) -> None:
        """Take some time."""
        nonlocal now
        threads.append(threading.current_thread() is not threading.main_thread())
        now += seconds

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    file = PosixFile.open(str(path), writable=True)
    with closing(file), loop_load().request_source(lambda: wanted):
        for _ in range(20):
            await file.datasync()
        assert threads == [True] + [wanted] * 19, "the first has to show how fast the host is"
        seconds = 1.0
        await file.datasync()
        seconds = 1e-4
        threads.clear()
        for _ in range(3):
            await file.datasync()
        assert threads == [True, wanted, wanted]


async def test_a_failed_datasync_raises_inline_and_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed datasync raises its error, inline and in a thread."""
    path = tmp_path / "file"
    path.touch()
    threads: list[bool] = []
    fails = True

    def fdatasync(_fd: int) -> None:
        threads.append(threading.current_thread() is not threading.main_thread())
        if fails:
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    with closing(PosixFile.open(str(path), writable=True)) as file:
        with pytest.raises(HostError, match="datasync"):
            await file.datasync()
        fails = False
        await file.datasync()
        fails = True
        with pytest.raises(HostError, match="datasync"):
            await file.datasync()
    assert threads == [True, True, False]
