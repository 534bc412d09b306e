"""The event loop never waits for the lock of the image's inode, nor is it throttled for long."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing

from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
from qedfuse.hostio import inlinepolicy, inodelock, systemcalls, threadcalls
from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE
from qedfuse.hostio.inlinepolicy import ALWAYS_SHORT_WRITE_BYTES
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CLUSTER: Final = 1 << 16


@pytest.fixture(autouse=True)
def _calls_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls in threads of Python, because these tests replace the system calls there."""
    monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")


class InodeLock:
    """Stands for the lock that the kernel holds while a file is changed.

    Each call that takes it can fail the test: if it is made in the event loop while a
    thread holds the lock.  A thread keeps the lock while the event loop goes on for some
    turns, as the kernel does when it throttles the thread.

    Attributes:
        waits: Calls of the event loop that would have waited.
        inline: Calls of the event loop that did not.
        threads: Calls in threads, by the loop's turns during which each held the lock.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the calls of `PosixFile` and of `ThreadCalls`."""
        self._lock = threading.Lock()
        self._loop = threading.get_ident()
        self.turns = 5
        self.waits: list[str] = []
        self.inline: list[str] = []
        self.threads: list[str] = []
        for name in ("pwrite", "pwritev", "ftruncate", "lseek", "utime"):
            monkeypatch.setattr(os, name, self._locked(name, getattr(os, name)))
        monkeypatch.setattr(
            threadcalls, "fallocate", self._locked("fallocate", systemcalls.fallocate)
        )

    def _locked(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object, **keywords: object) -> object:
            if threading.get_ident() == self._loop:
                if self._lock.locked():
                    self.waits.append(name)
                self.inline.append(name)
                return real(*arguments, **keywords)
            with self._lock:
                self.threads.append(name)
                for _ in range(self.turns):
                    trio.from_thread.run(trio.lowlevel.cancel_shielded_checkpoint)
                return real(*arguments, **keywords)

        return call


@contextmanager
def opened(path: Path) -> Iterator[PosixFile]:
    """Open a new file."""
    path.touch()
    file = PosixFile.open(str(path), writable=True)
    try:
        yield file
    finally:
        file.close()


@pytest.mark.parametrize("change", ["pwrite", "truncate", "punch", "reserve"])
async def test_nothing_is_changed_inline_while_a_thread_changes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """While a thread changes the file no change is made inline; afterwards it is again."""
    # Not because the machine is busy: a short write that takes long counts as throttled.
    monkeypatch.setattr(inlinepolicy, "_THROTTLED_SECONDS", math.inf)
    arguments: Any = {
        "pwrite": (0, bytes(4 * ALWAYS_SHORT_WRITE_BYTES + 1)),
        "truncate": (1 << 20,),
        "punch": ((0, 4096),),
        "reserve": (0, 4096),
    }[change]
    with opened(tmp_path / "file") as file:
        lock = InodeLock(monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr(file, change), *arguments)
            while not lock.threads:
                await trio.lowlevel.checkpoint()
            assert not file.can_write_inline(1)
            assert not file.try_write(0, b"x")
            assert not file.try_grow(1 << 21)
            nursery.start_soon(file.pwrite, 5 << 20, b"short")
            nursery.start_soon(file.next_data, 0)
            nursery.start_soon(file.set_times, 1, 2)
        assert (lock.waits, lock.inline, len(lock.threads)) == ([], [], 4)
        assert file.can_write_inline(1)
        assert file.try_write(0, b"x")
        assert file.try_grow(6 << 20)
        assert await file.next_data(5 << 20) is not None
        await file.set_times(1, 2)
        assert lock.inline == ["pwrite", "ftruncate", "lseek", "utime"]
        assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (1, 2)
        assert await file.pread(5 << 20, 5) == b"short"


async def test_a_change_that_fails_in_a_thread_blocks_no_other(tmp_path: Path) -> None:
    """After a failed or cancelled change in a thread, changes are made inline again."""
    with opened(tmp_path / "file") as file:
        with pytest.raises(HostError, match="truncate"):
            await file.truncate(-1)
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.truncate(1)
        assert file.can_write_inline(ALWAYS_SHORT_WRITE_BYTES)


async def test_threads_that_change_a_file_leave_others_for_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes of one file leave worker threads for reads."""
    with opened(tmp_path / "file") as file:
        lock = InodeLock(monkeypatch)
        lock.turns = 3
        limiter = trio.to_thread.current_default_thread_limiter()
        most = 0
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(file.pwrite, number << 21, bytes((1 << 20) + 1))
            while len(lock.threads) < 50:
                most = max(most, limiter.borrowed_tokens)
                await trio.lowlevel.checkpoint()
        assert 0 < most <= 4


@pytest.mark.parametrize("length", [4096, 2 * ALWAYS_SHORT_WRITE_BYTES])
async def test_writers_do_not_keep_each_other_in_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Writers write in threads because of a long write, and begin no such write after its end."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    writers = 8
    with opened(tmp_path / "file") as file:
        lock = InodeLock(monkeypatch)
        is_over = False
        late: list[bool] = []
        in_thread = inodelock.InodeLock.in_thread

        async def noted_in_thread(*arguments: Any, **keywords: Any) -> object:  # noqa: ANN401  those of it
            late.append(is_over)
            return await in_thread(*arguments, **keywords)

        monkeypatch.setattr(inodelock.InodeLock, "in_thread", noted_in_thread)

        async def write_long() -> None:
            nonlocal is_over
            await file.pwrite(0, bytes(4 * ALWAYS_SHORT_WRITE_BYTES + 1))
            is_over = True

        async def write() -> None:
            left = 100
            while left:
                left -= is_over
                if not file.try_write(0, bytes(length)):
                    await file.pwrite(0, bytes(length))
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_long)
            while not lock.threads:  # the tasks of a nursery start in a random order
                await trio.lowlevel.checkpoint()
            for _ in range(writers):
                nursery.start_soon(write)
        assert len(lock.threads) == len(late) > 1
        assert not any(late)
        assert len(lock.inline) >= writers * 99
        assert lock.waits == []


@pytest.mark.parametrize("event", ["cut", "throttled", "ended"])
async def test_a_waiter_for_short_writes_is_not_starved(event: str) -> None:
    """A task that waits for short writes in threads continues although new ones keep coming."""
    lock = inodelock.InodeLock()
    short, cut = threading.Event(), threading.Event()
    woken: list[int] = []

    async def wait_for_others() -> None:
        await lock.wait_for_short_writes()
        woken.append(lock.contention)

    async with trio.open_nursery() as nursery:
        try:
            wait = partial(trio.to_thread.run_sync, short.wait)
            nursery.start_soon(partial(lock.in_thread, wait, is_short_write=True))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(wait_for_others)
            await trio.testing.wait_all_tasks_blocked()
            assert not woken
            if event == "cut":
                nursery.start_soon(lock.in_thread, partial(trio.to_thread.run_sync, cut.wait))
            elif event == "throttled":
                lock.record_slow_write(0.01)
                lock.record_slow_write(0.01)
            else:
                short.set()
            with trio.fail_after(60):
                while not woken:
                    await trio.lowlevel.checkpoint()
            assert woken == [0 if event == "ended" else 2]
        finally:
            short.set()
            cut.set()
    lock.end_throttling()
    assert lock.recheck_free()


class Throttle:
    """Stands for a kernel that makes writers wait.

    Attributes:
        now: What the clock shows, in seconds.
        seconds: How long each write takes.
        threads: For each write, whether it was made in a thread.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the calls that write, and the clock."""
        self.now = 0.0
        self.seconds = 0.0001
        self.threads: list[bool] = []
        for name in ("pwrite", "pwritev"):
            monkeypatch.setattr(os, name, self._throttled(getattr(os, name)))
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def _throttled(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            self.threads.append(threading.current_thread() is not threading.main_thread())
            self.now += self.seconds
            return real(*arguments)

        return call

    def show(self, file: PosixFile) -> None:
        """Let a file learn that short writes are throttled."""
        self.seconds = 0.02
        for _ in range(2):
            assert file.try_write(0, b"x")
        assert not file.can_write_inline(1)


async def test_short_writes_that_the_kernel_throttles_go_to_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Throttled short writes go to a thread until one of them is fast."""
    throttle = Throttle(monkeypatch)
    with opened(tmp_path / "file") as file:
        throttle.seconds = 0.02
        assert file.try_write(0, b"x")
        assert file.try_write(0, b"x"), "it takes two to show it"
        assert not file.try_write(0, b"x")
        assert not file.try_grow(1 << 20)
        for _ in range(3):
            await file.pwrite(0, b"x")
        throttle.seconds = 0.0001
        await file.pwrite(0, b"x")
        assert file.try_write(0, b"x")
        assert throttle.threads == [False, False, True, True, True, True, False]


async def test_one_slow_short_write_is_no_throttling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow short write, or two far apart, do not count as throttling."""
    throttle = Throttle(monkeypatch)
    with opened(tmp_path / "file") as file:
        for _ in range(3):
            throttle.seconds = 0.02
            assert file.try_write(0, b"x")
            throttle.now += 1.1
            assert file.can_write_inline(1)
        throttle.seconds = 2.0
        await file.pwrite(0, b"x")
        await file.pwrite(0, b"x")
        assert not file.can_write_inline(1), "the second began when the first had just ended"


async def test_a_fast_long_write_ends_the_throttling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast long write ends the throttled state."""
    throttle = Throttle(monkeypatch)
    with opened(tmp_path / "file") as file:
        throttle.show(file)
        throttle.seconds = 0.0001
        assert not file.try_write(0, bytes(2 * ALWAYS_SHORT_WRITE_BYTES))
        await file.pwrite(0, bytes(2 * ALWAYS_SHORT_WRITE_BYTES))
        assert file.try_write(0, bytes(2 * ALWAYS_SHORT_WRITE_BYTES))
        assert file.try_grow(1 << 20)
        assert throttle.threads == [False, False, True, False]


async def test_throttling_is_forgotten_after_a_second_without_a_slow_short_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The throttled state ends a second after the last slow short write."""
    throttle = Throttle(monkeypatch)
    with opened(tmp_path / "file") as file:
        throttle.show(file)
        for _ in range(4):
            throttle.now += 0.9
            assert not file.can_write_inline(1)
            assert not file.try_grow(1 << 20)
            await file.pwrite(0, b"x")
        throttle.seconds = 0.5
        await file.pwrite(0, bytes(8 * ALWAYS_SHORT_WRITE_BYTES))
        assert not file.can_write_inline(1)
        await file.pwrite(0, bytes(8 * ALWAYS_SHORT_WRITE_BYTES))
        assert file.try_grow(3 << 20)
        assert file.try_write(0, b"x")
        assert throttle.threads == [False] * 2 + [True] * 6 + [False]


async def test_a_datasync_with_much_to_write_back_is_not_made_inline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A datasync after much written data goes to a thread, however fast the last ones were."""
    threads: list[bool] = []

    def fdatasync(_fd: int) -> None:
        threads.append(threading.current_thread() is not threading.main_thread())

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    with opened(tmp_path / "file") as file:
        for length in (1, 1, 1 << 20, (1 << 21) + 1, 1):
            await file.pwrite(0, bytes(length))
            await file.datasync()
    assert threads == [True, False, False, True, False]


@pytest.mark.parametrize("seed", range(4))
async def test_the_loop_never_waits_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A disk under all kinds of requests never waits for the inode's lock in the event loop."""
    chance = random.Random(seed)
    size = 64 << 20
    path = qemu.create(tmp_path / "image.qed", size)
    content = bytearray(size)
    lock = InodeLock(monkeypatch)
    async with open_disk(str(path), OpenOptions(writable=True)) as disk:

        async def write(start: int, length: int) -> None:
            data = chance.randbytes(4096) * -(-length // 4096)
            content[start : start + length] = data[:length]
            if not disk.try_write(start, data[:length]):
                await disk.write(start, data[:length])

        async def discard(start: int, length: int) -> None:
            content[start : start + length] = bytes(length)
            await disk.discard(start, length)

        for _ in range(25):
            areas = chance.sample(range(0, size, 4 << 20), 6)
            async with trio.open_nursery() as nursery:
                for area in areas:
                    length = chance.choice(
                        (512, CLUSTER, ALWAYS_SHORT_WRITE_BYTES, (1 << 20) + 512, 3 << 20)
                    )
                    start = area + chance.randrange(0, (4 << 20) - length, 512)
                    task = discard if chance.random() < 0.3 else write
                    nursery.start_soon(task, start, length)
                if chance.random() < 0.3:
                    nursery.start_soon(disk.flush)
        for area in range(0, size, 4 << 20):
            assert await disk.read(area, 4 << 20) == content[area : area + (4 << 20)]
    assert lock.waits == []
    assert len(lock.inline) > 20
    assert len(lock.threads) > 20
