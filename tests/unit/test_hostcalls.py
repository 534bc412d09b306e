"""Host calls in threads: native threads and threads of trio keep the same promises.

A native read of a pipe with the offset -1 blocks its thread until the test writes to the pipe.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qedfuse.errors import HostError
from qedfuse.hostio import nativecalls, posixfile, posixreader
from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE, HostCalls, host_calls, make_host_calls
from qedfuse.hostio.nativecalls import NativeCalls, make_io_threads
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.hostio.threadcalls import ThreadCalls
from tests.support.descriptors import opened, pipe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from qedfuse.hostio._iothreads import IoThreads
    from qedfuse.hostio.nativecalls import Tag

needs_extension = pytest.mark.skipif(make_io_threads() is None, reason="no extension")
BOTH: Final = [pytest.param("native", marks=needs_extension), "threads"]
CACHED: Final = 1e-6
"""Duration of a read that finds its data in the page cache, in seconds."""
FROM_DISK: Final = 1e-3
UNUSED_FD: Final = 1 << 20
"""A number that no descriptor has."""


def native() -> IoThreads[Tag]:
    """Return a pool of native threads."""
    threads = make_io_threads()
    assert threads is not None
    return threads


# --- both implementations -------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
async def test_calls_do_what_their_system_calls_do(tmp_path: Path, kind: str) -> None:
    """Reads, writes, truncates, reservations and datasyncs have their effect and result."""
    calls = make_host_calls(kind)
    with opened(tmp_path / "file") as fd:
        seconds = await calls.write(fd, 2, (b"abc", bytearray(b"de"), memoryview(b"f")))
        assert 0 <= seconds < math.inf
        view = memoryview(bytearray(20))
        count, seconds = await calls.read(fd, 1, view)
        assert (count, bytes(view[:7])) == (7, b"\0abcdef")
        assert 0 <= seconds < math.inf
        await calls.truncate(fd, 4)
        await calls.fallocate(fd, 0, (0, 10), (10, 10))
        await calls.datasync(fd)
        await calls.fallocate(fd, 0)
        assert (await calls.read(fd, 0, view))[0] == 20
        assert view == b"\0\0ab" + bytes(16)


@pytest.mark.parametrize("kind", BOTH)
async def test_a_refused_call_raises_its_errno(kind: str) -> None:
    """Each call raises the OSError of the kernel, with number and text."""
    calls = make_host_calls(kind)
    failing: list[Callable[[], Awaitable[object]]] = [
        lambda: calls.read(UNUSED_FD, 0, memoryview(bytearray(1))),
        lambda: calls.write(UNUSED_FD, 0, (b"x",)),
        lambda: calls.datasync(UNUSED_FD),
        lambda: calls.truncate(UNUSED_FD, 0),
        lambda: calls.fallocate(UNUSED_FD, 0, (0, 1)),
    ]
    for call in failing:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            await call()
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("kind", BOTH)
async def test_a_failed_range_ends_a_fallocate(tmp_path: Path, kind: str) -> None:
    """Ranges before the first that fails are allocated, those after it are not."""
    calls = make_host_calls(kind)
    with opened(tmp_path / "file") as fd:
        with pytest.raises(OSError, match="Invalid argument"):
            await calls.fallocate(fd, 0, (0, 1000), (0, 0), (0, 3000))
        assert os.fstat(fd).st_size == 1000


@pytest.mark.parametrize("kind", BOTH)
async def test_a_cancelled_task_makes_no_call(tmp_path: Path, kind: str) -> None:
    """A task that is cancelled before a call raises Cancelled, and the file is unchanged."""
    calls = make_host_calls(kind)
    with opened(tmp_path / "file", b"0123") as fd:
        changes: list[Callable[[], Awaitable[object]]] = [
            lambda: calls.write(fd, 0, (b"x",)),
            lambda: calls.truncate(fd, 0),
            lambda: calls.fallocate(fd, 0, (0, 100)),
        ]
        for change in changes:
            with trio.CancelScope() as scope:
                scope.cancel()
                await change()
            assert scope.cancelled_caught
        assert os.pread(fd, 100, 0) == b"0123"


@pytest.mark.parametrize("kind", BOTH)
async def test_a_task_that_is_cancelled_during_a_call_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The call ends with its result; Cancelled is raised at the next checkpoint."""
    calls = make_host_calls(kind)
    scope = trio.CancelScope()
    events: list[str] = []
    view = memoryview(bytearray(4))
    go = threading.Event()

    with opened(tmp_path / "file") as fd, pipe() as (reader, writer):

        async def call() -> None:
            with scope:
                if kind == "native":
                    assert (await calls.read(reader, -1, view))[0] == 4
                else:
                    await calls.datasync(fd)
                events.append("ended")
                await trio.lowlevel.checkpoint()
                events.append("not cancelled")

        if kind == "threads":
            monkeypatch.setattr(os, "fdatasync", lambda _fd: go.wait())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert events == []
            os.write(writer, b"data")
            go.set()
    assert events == ["ended"]
    assert scope.cancelled_caught


def test_an_event_loop_has_one_object_for_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """`host_calls` returns one object per event loop, of the kind that the variable names."""

    async def get() -> tuple[HostCalls, HostCalls]:
        await trio.lowlevel.checkpoint()
        return host_calls(), host_calls()

    kept: list[HostCalls] = []
    best = ThreadCalls if make_io_threads() is None else NativeCalls
    for value, kind in ((None, best), ("native", best), ("threads", ThreadCalls)):
        if value is None:
            monkeypatch.delenv(HOST_CALLS_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(HOST_CALLS_VARIABLE, value)
        first, second = trio.run(get)
        assert first is second
        assert type(first) is kind
        assert all(first is not other for other in kept)
        kept.append(first)


async def test_calls_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension threads of trio make the calls."""
    monkeypatch.setattr(nativecalls, "_extension", None)
    assert type(make_host_calls(None)) is ThreadCalls


# --- native threads -------------------------------------------------------------------------


@needs_extension
async def test_finished_calls_are_delivered_early_by_a_busy_task(tmp_path: Path) -> None:
    """`deliver` resumes the tasks of finished calls; `resuming` counts those that have not run."""
    calls = NativeCalls(native())
    ended: list[int] = []

    with opened(tmp_path / "file", b"0123") as fd:

        async def read(length: int) -> None:
            ended.append((await calls.read(fd, 0, memoryview(bytearray(length))))[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 1)
            nursery.start_soon(read, 2)
            while calls._threads.pending() + calls.resuming + len(ended) < 2:
                await trio.lowlevel.checkpoint()
            # Without a checkpoint trio cannot notice the end of the calls.
            while calls.resuming + len(ended) < 2:
                if calls.has_finished():
                    calls.deliver()
            assert not calls.has_finished()
            while calls.resuming:
                await trio.lowlevel.checkpoint()
            assert sorted(ended) == [1, 2]
    assert calls.resuming == 0


@needs_extension
@pytest.mark.expect_log("the function at the end of a host call failed")
async def test_a_function_may_be_called_at_the_end_of_a_call(tmp_path: Path) -> None:
    """A tag that is not a task is called in the event loop; its error affects no other call."""
    calls = NativeCalls(native())
    got: list[tuple[int, int]] = []
    threads = calls._threads
    done = trio.Event()

    def last(result: int, nanoseconds: int) -> None:
        got.append((result, nanoseconds))
        assert threading.current_thread() is threading.main_thread()
        done.set()

    def broken(_result: int, _nanoseconds: int) -> None:
        msg = "broken"
        raise ValueError(msg)

    with opened(tmp_path / "file", b"0123") as fd, pipe() as (reader, writer):
        for _ in range(3):
            threads.submit_read(reader, -1, bytearray(1), broken)
        os.write(writer, b"xyz")
        with trio.fail_after(60):
            await calls.datasync(fd)
            threads.submit_read(fd, 0, bytearray(3), last)
            await done.wait()
    assert len(got) == 1
    assert got[0][0] == 3
    assert got[0][1] >= 0


class InterruptedThreads:
    """A pool in whose calls a SIGINT arrives, right after a read was submitted."""

    def __init__(self) -> None:
        """Wrap a pool of native threads."""
        self._threads = native()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  any method of the pool
        return getattr(self._threads, name)

    def submit_read(self, *arguments: Any) -> None:  # noqa: ANN401
        """Submit a read, and interrupt the program."""
        self._threads.submit_read(*arguments)
        signal.raise_signal(signal.SIGINT)


@needs_extension
def test_an_interrupt_waits_for_the_call(tmp_path: Path) -> None:
    """A KeyboardInterrupt right after submitting a call is raised when the call has ended."""
    view = memoryview(bytearray(4))
    ended: list[int] = []

    async def main(fd: int) -> None:
        threads: Any = InterruptedThreads()
        calls = NativeCalls(threads)
        ended.append((await calls.read(fd, 0, view))[0])
        await trio.sleep_forever()

    with opened(tmp_path / "file", b"0123") as fd, pytest.raises(KeyboardInterrupt):
        trio.run(main, fd)
    assert ended == [4]
    assert bytes(view) == b"0123"


@needs_extension
def test_an_event_loop_ends_beside_calls_in_flight() -> None:
    """A call that no task waits for does not keep the event loop, and its end harms nothing."""
    with pipe() as (reader, writer):

        async def main() -> None:
            calls = NativeCalls(native())
            calls._threads.submit_read(reader, -1, bytearray(1), lambda *_: pytest.fail("called"))
            await wait_all_tasks_blocked()

        trio.run(main)
        os.write(writer, b"x")


@needs_extension
async def test_a_file_on_a_disk_that_does_not_answer_delays_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reads of a stuck file occupy a part of the threads, and the rest wait in their order."""
    monkeypatch.delenv(HOST_CALLS_VARIABLE, raising=False)
    count = 200
    ended = 0
    with opened(tmp_path / "file", b"0123") as fd, pipe() as (reader, writer):
        stuck = PosixFile(os.dup(reader), "stuck", writable=False)
        other = PosixFile(os.dup(fd), "other", writable=True)

        async def read() -> None:
            nonlocal ended
            assert await stuck.pread_into(-1, memoryview(bytearray(1))) == 1
            ended += 1

        with closing(stuck), closing(other):
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(read)
                await wait_all_tasks_blocked()
                calls = host_calls()
                assert isinstance(calls, NativeCalls)
                assert calls._threads.threads() == calls._threads.pending() == 28
                other.read_policy.is_inline = False
                assert await other.pread(1, 2) == b"12"
                await other.truncate(2)
                await other.datasync()
                assert ended == 0
                os.write(writer, bytes(count))
    assert ended == count


class HeldThreads:
    """A pool whose calls are not made before `release`."""

    def __init__(self) -> None:
        """Wrap a pool of native threads."""
        self._threads = native()
        self.held: list[Callable[[], None]] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  any method of the pool
        method = getattr(self._threads, name)
        if not name.startswith("submit_"):
            return method
        return lambda *arguments: self.held.append(partial(method, *arguments))

    def release(self) -> None:
        """Submit the calls that were held."""
        held, self.held = self.held, []
        for submit in held:
            submit()


@needs_extension
@pytest.mark.parametrize("change", ["pwrite", "truncate", "punch", "reserve"])
async def test_nothing_is_changed_inline_while_a_native_thread_changes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A native call that changes the file counts as contention for the inode's lock."""
    threads: Any = HeldThreads()
    calls = NativeCalls(threads)
    monkeypatch.setattr(posixfile, "host_calls", lambda: calls)
    arguments: Any = {
        "pwrite": (0, bytes((1 << 20) + 1)),
        "truncate": (1 << 20,),
        "punch": ((0, 4096), (8192, 4096)),
        "reserve": (0, 4096),
    }[change]
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    with closing(PosixFile.open(str(path), writable=True)) as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(getattr(file, change), *arguments))
            await wait_all_tasks_blocked()
            assert len(threads.held) == 1
            assert not file.can_write_inline(1)
            assert not file.try_write(0, b"x")
            assert not file.try_grow(1 << 21)
            nursery.start_soon(file.pwrite, 5 << 20, b"short")
            for _ in range(5):
                nursery.start_soon(file.truncate, 6 << 20)
            await wait_all_tasks_blocked()
            assert len(threads.held) == 4, "at most four concurrent changes of one file"
            while file._inode.contention:
                threads.release()
                await wait_all_tasks_blocked()
        assert file.can_write_inline(1)
        assert file.try_grow(7 << 20)
        assert await file.pread(5 << 20, 5) == b"short"


# --- which reads are tried inline -----------------------------------------------------------


def test_misses_in_a_row_send_reads_to_threads() -> None:
    """After 4 misses in a row reads go to threads directly; a hit between them prevents that."""
    policy = ReadPolicy()
    for _ in range(10):
        for _ in range(3):
            policy.record_inline_miss()
        assert policy.is_inline
        policy.misses = 0
    for _ in range(4):
        assert policy.is_inline
        policy.record_inline_miss()
    assert not policy.is_inline


def test_cached_reads_in_a_row_bring_reads_back() -> None:
    """After 4 direct reads in a row that were cached, reads are tried inline again."""
    policy = ReadPolicy()
    for _ in range(4):
        policy.record_inline_miss()
    for _ in range(10):
        for _ in range(3):
            policy.record_direct_read(4096, CACHED)
        policy.record_direct_read(4096, FROM_DISK)
        assert not policy.is_inline
    for _ in range(4):
        assert not policy.is_inline
        policy.record_direct_read(4096, CACHED)
    assert policy.is_inline
    for _ in range(3):
        policy.record_inline_miss()
    assert policy.is_inline


@pytest.mark.parametrize(
    ("length", "seconds", "is_cached"),
    [
        (512, 14e-6, True),
        (4096, 14e-6, True),
        (4096, 60e-6, False),
        (1 << 20, 200e-6, True),
        (1 << 20, 300e-6, False),
    ],
)
def test_a_longer_read_may_take_longer(length: int, seconds: float, *, is_cached: bool) -> None:
    """How long a cached read may take depends on its length."""
    policy = ReadPolicy()
    for _ in range(4):
        policy.record_inline_miss()
    for _ in range(4):
        policy.record_direct_read(length, seconds)
    assert policy.is_inline is is_cached


def test_a_sequential_reader_stays_inline() -> None:
    """Reads that find what the kernel has read ahead stay inline, except the first of each."""
    policy = ReadPolicy()
    for number in range(1000):
        assert policy.is_inline
        if number % 32 == 0:
            policy.record_inline_miss()
        else:
            policy.misses = 0


def test_a_file_system_without_nowait_is_not_tried_again() -> None:
    """Once inline reads are disabled, cached reads do not enable them."""
    policy = ReadPolicy()
    policy.disable_inline()
    for _ in range(10):
        policy.record_direct_read(4096, CACHED)
    assert not policy.is_inline


class TimedCalls(ThreadCalls):
    """Calls without retries, whose reads report a duration that the test sets.

    Attributes:
        seconds: The duration of the next reads.
        reads: The offset and length of each read.
    """

    retries_reads = False

    def __init__(self) -> None:
        """Start with reads from the disk."""
        self.seconds = FROM_DISK
        self.reads: list[tuple[int, int]] = []

    async def read(self, fd: int, offset: int, view: memoryview) -> tuple[int, float]:
        """Read, and report the duration."""
        self.reads.append((offset, len(view)))
        await trio.lowlevel.checkpoint()
        return os.preadv(fd, (view,), offset), self.seconds


class PageCache:
    """Stands for the page cache: reads with RWF_NOWAIT find a part of their data.

    Attributes:
        cached: How many bytes each read finds.
        tries: The offset of each read with RWF_NOWAIT.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace preadv(2)."""
        self.cached = 0
        self.tries: list[int] = []
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, fd: int, views: tuple[memoryview], offset: int, flags: int = 0) -> int:
        if flags != os.RWF_NOWAIT:
            return self._real(fd, views, offset)
        self.tries.append(offset)
        if not self.cached:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return self._real(fd, (views[0][: self.cached],), offset)


async def test_reads_that_miss_the_page_cache_stop_to_look_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A miss goes to a thread without a second try, and after some misses without a first."""
    content = bytes(range(200))
    (tmp_path / "file").write_bytes(content)
    calls, cache = TimedCalls(), PageCache(monkeypatch)
    monkeypatch.setattr(posixreader, "host_calls", lambda: calls)
    view = memoryview(bytearray(10))
    with closing(PosixFile.open(str(tmp_path / "file"))) as file:
        for offset in range(8):
            assert not file.try_read(offset, view)
            assert await file.pread(offset, 10) == content[offset : offset + 10]
        assert cache.tries == [0, 1, 2, 3]
        assert calls.reads == [(offset, 10) for offset in range(8)]

        # The file is cached again: the threads notice it.
        cache.cached, calls.seconds = 1000, CACHED
        for offset in range(4):
            assert not file.try_read(offset, view)
            assert await file.pread(195 + offset, 10) == content[195 + offset :]
        assert file.try_read(20, view)
        assert view == content[20:30]
        assert await file.pread(30, 10) == content[30:40]
        assert cache.tries == [0, 1, 2, 3, 20, 30]


async def test_a_read_that_is_cached_in_part_is_completed_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page cache lacks is read by a thread, and counts as a miss."""
    content = bytes(range(200))
    (tmp_path / "file").write_bytes(content)
    calls, cache = TimedCalls(), PageCache(monkeypatch)
    monkeypatch.setattr(posixreader, "host_calls", lambda: calls)
    cache.cached = 3
    with closing(PosixFile.open(str(tmp_path / "file"))) as file:
        for offset in range(6):
            assert await file.pread(offset, 10) == content[offset : offset + 10]
        assert await file.pread(195, 10) == content[195:]
    assert cache.tries == [0, 1, 2, 3]
    assert calls.reads == [*((offset + 3, 7) for offset in range(4)), (4, 10), (5, 10), (195, 10)]


async def test_a_failed_read_leaves_its_slot(tmp_path: Path) -> None:
    """Reads that fail do not use up the number of reads that one file may have in threads."""
    (tmp_path / "file").write_bytes(b"0123")
    file = PosixFile(os.open(tmp_path / "file", os.O_WRONLY), "file", writable=True)
    file.read_policy.is_inline = False
    with closing(file):
        for _ in range(100):
            with pytest.raises(HostError, match="read: Bad file descriptor"):
                await file.pread(0, 4)
            with trio.CancelScope() as scope:
                scope.cancel()
                await file.pread(0, 4)


async def test_threads_of_trio_suffice_for_several_files_that_do_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit of the threads of trio is raised above what several files can occupy."""
    monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")
    limiter = trio.to_thread.current_default_thread_limiter()
    host_calls()
    assert limiter.total_tokens == 1024


async def test_a_higher_limit_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of trio's threads that the program has set higher is not lowered."""
    monkeypatch.setenv(HOST_CALLS_VARIABLE, "threads")
    limiter = trio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = 2000
    host_calls()
    assert limiter.total_tokens == 2000
