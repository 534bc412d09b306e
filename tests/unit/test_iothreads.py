"""The native threads for system calls: results, buffers, answers, and the life of the threads.

A read of a pipe with the offset -1 blocks its thread until the test writes to the pipe.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import resource
import select
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.descriptors import opened, pipe
from tests.support.refusedcalls import CLONE3, run_with_late_refusal, run_without

iothreads = pytest.importorskip("qedfuse.hostio._iothreads", reason="the extension was not built")

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio._iothreads import IoThreads

WAIT_SECONDS: Final = 60.0
"""After this time a wait counts as a hang."""

new_capsule: Final = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)

Call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong)


class AnswerStruct(ctypes.Structure):
    """struct answer of `_iothreads.c`."""

    _fields_ = (("call", Call),)


class Answer:
    """An answer that calls a Python function with the bytes of the read and its result.

    Attributes:
        capsule: The argument of ``submit_read``.
        error: What the function has raised.
    """

    def __init__(self, function: Callable[[bytes, int], None]) -> None:
        """Make the capsule for ``function``."""
        self._function = function
        self._struct = AnswerStruct(Call(self._call))
        self.capsule = new_capsule(ctypes.addressof(self._struct), b"qedfuse.answer", None)
        self.error: BaseException | None = None

    def _call(self, struct: int | None, data: int | None, result: int) -> None:
        try:
            assert struct == ctypes.addressof(self._struct)
            assert data is not None
            self._function(ctypes.string_at(data, max(0, result)), result)
        except BaseException as error:  # noqa: BLE001  reported by the test
            self.error = error


def make(max_threads: int = 4, **keywords: float) -> IoThreads[object]:
    """Make a pool."""
    return iothreads.IoThreads(max_threads, **keywords)  # type: ignore[no-any-return]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds for which there is no event."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come"
        os.sched_yield()


def is_readable(fd: int, seconds: float = 0.0) -> bool:
    """Return whether a descriptor is, or becomes, readable."""
    return bool(select.select([fd], [], [], seconds)[0])


def collect(threads: IoThreads[object], count: int = 1) -> list[tuple[object, int]]:
    """Wait for ``count`` finished calls; return their tags and results."""
    found: list[tuple[object, int]] = []
    while len(found) < count:
        assert is_readable(threads.fileno(), WAIT_SECONDS), "it does not come"
        for tag, result, nanoseconds in threads.collect_finished():
            assert nanoseconds >= 0
            found.append((tag, result))
    assert len(found) == count
    return found


def is_held(buffer: bytearray) -> bool:
    """Return whether the memory of a buffer is held."""
    try:
        buffer.append(0)
    except BufferError:
        return True
    del buffer[-1]
    return False


def pool_threads(tasks: Path = Path("/proc/self/task")) -> dict[str, dict[str, str]]:
    """Return the status of each thread of the pools of a process, by its number."""
    found = {}
    for path in tasks.iterdir():
        try:
            lines = (path / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        status = {name: value.strip() for name, _, value in (x.partition(":") for x in lines)}
        if status.get("Name") == "qedfuse-io":  # the file of a thread that ends may be empty
            found[path.name] = status
    return found


def is_reading(fd: int) -> bool:
    """Return whether a thread of a pool is in a system call whose first argument is ``fd``."""
    for number in pool_threads():
        fields = Path(f"/proc/self/task/{number}/syscall").read_text().split()
        if len(fields) > 1 and int(fields[1], 16) == fd:
            return True
    return False


@pytest.fixture(autouse=True)
def _no_other_threads() -> None:
    """Wait for the threads of the pools of other tests to end."""
    wait_until(lambda: not pool_threads())


# --- system calls ---------------------------------------------------------------------------


def test_a_read_fills_the_buffer_or_ends_with_the_file(tmp_path: Path) -> None:
    """The result of a read is the number of bytes, less than asked for only where a file ends."""
    threads = make()
    with opened(tmp_path / "file", b"0123456789") as fd:
        for offset, length, expected in (
            (0, 4, b"0123"),
            (8, 4, b"89"),
            (10, 4, b""),
            (1 << 50, 4, b""),
            (3, 0, b""),
        ):
            buffer = bytearray(length)
            threads.submit_read(fd, offset, memoryview(buffer), offset)
            assert collect(threads) == [(offset, len(expected))]
            assert buffer[: len(expected)] == expected


def test_a_short_read_is_continued() -> None:
    """A read of which the kernel returns a part continues until its buffer is full."""
    threads = make()
    buffer = bytearray(8)
    with pipe() as (reader, writer):
        threads.submit_read(reader, -1, buffer, "first")
        os.write(writer, b"012")
        wait_until(lambda: buffer[:3] == b"012")
        assert not threads.has_finished()
        os.write(writer, b"3456789")
        assert collect(threads) == [("first", 8)]
        assert buffer == b"01234567"
        assert os.read(reader, 9) == b"89"


@pytest.mark.parametrize("count", [0, 1, 1024, 1025, 3000])
def test_a_write_takes_any_number_of_parts(tmp_path: Path, count: int) -> None:
    """All buffers are written one behind the other, empty ones and more than IOV_MAX included."""
    threads = make()
    parts = tuple(bytes([index % 251]) * ((index + 1) % 5) for index in range(count))
    whole = b"".join(parts)
    with opened(tmp_path / "file") as fd:
        threads.submit_write(fd, 3, parts, None)
        assert collect(threads) == [(None, len(whole))]
        assert os.pread(fd, 1 << 20, 0) == (bytes(3) + whole if whole else b"")


def test_a_write_accepts_any_buffer(tmp_path: Path) -> None:
    """Bytes, bytearrays and views of other types are written as bytes."""
    threads = make()
    view = memoryview(bytes(range(8))).cast("H")
    with opened(tmp_path / "file") as fd:
        threads.submit_write(fd, 0, (b"ab", bytearray(b"cd"), view), None)
        assert collect(threads) == [(None, 12)]
        assert os.pread(fd, 20, 0) == b"abcd" + bytes(range(8))


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    """After a part of a write the rest is tried, and its error is the result."""
    threads = make()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path / "file") as fd:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            threads.submit_write(fd, 1 << 19, (bytes(1 << 20), b"x"), None)
            assert collect(threads) == [(None, -errno.EFBIG)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.fstat(fd).st_size == 1 << 20


def test_calls_that_change_a_file(tmp_path: Path) -> None:
    """Truncate, fallocate and datasync do what their system calls do; the result is 0."""
    threads = make()
    with opened(tmp_path / "file", b"0123") as fd:
        threads.submit_truncate(fd, 2, "cut")
        assert collect(threads) == [("cut", 0)]
        assert os.fstat(fd).st_size == 2
        threads.submit_fallocate(fd, 0, 0, 1 << 16, "reserve")
        assert collect(threads) == [("reserve", 0)]
        assert os.fstat(fd).st_size == 1 << 16
        threads.submit_fallocate(fd, 1, 1 << 16, 1 << 16, "reserve past the end")
        assert collect(threads) == [("reserve past the end", 0)]
        assert os.fstat(fd).st_size == 1 << 16
        threads.submit_datasync(fd, "sync")
        assert collect(threads) == [("sync", 0)]


def test_an_error_is_the_negative_result(tmp_path: Path) -> None:
    """A call that fails reports its errno, and the thread goes on."""
    threads = make()
    submit: list[Callable[[int], None]] = [
        lambda fd: threads.submit_read(fd, 0, bytearray(4), fd),
        lambda fd: threads.submit_write(fd, 0, (b"x",), fd),
        lambda fd: threads.submit_datasync(fd, fd),
        lambda fd: threads.submit_truncate(fd, 0, fd),
        lambda fd: threads.submit_fallocate(fd, 0, 0, 1, fd),
    ]
    for call in submit:
        call(-1)
        assert collect(threads) == [(-1, -errno.EBADF)]
    full = os.open("/dev/full", os.O_RDWR)
    with pipe() as (reader, _), opened(tmp_path / "file") as fd:
        threads.submit_write(full, 0, (b"x",), "full")
        assert collect(threads) == [("full", -errno.ENOSPC)]
        threads.submit_read(reader, 0, bytearray(4), "pipe")
        assert collect(threads) == [("pipe", -errno.ESPIPE)]
        threads.submit_write(fd, -1, (b"x",), "before the start")
        threads.submit_read(fd, -2, bytearray(4), "before the start")
        threads.submit_truncate(fd, -1, "before the start")
        assert collect(threads, 3) == [("before the start", -errno.EINVAL)] * 3
    os.close(full)


def test_a_call_needs_no_gil(tmp_path: Path) -> None:
    """A call is made and finished while the submitting thread keeps the GIL."""
    threads = make()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10 * WAIT_SECONDS)
    try:
        with opened(tmp_path / "file", b"0123") as fd:
            threads.submit_read(fd, 0, bytearray(4), None)
            end = time.monotonic() + WAIT_SECONDS
            while not threads.has_finished():
                assert time.monotonic() < end
    finally:
        sys.setswitchinterval(interval)
    assert collect(threads) == [(None, 4)]


# --- collecting, and what a call holds ------------------------------------------------------


def test_the_eventfd_is_readable_while_calls_wait_to_be_collected(tmp_path: Path) -> None:
    """The eventfd, `has_finished` and `pending` show whether calls are finished."""
    threads = make(1)
    with opened(tmp_path / "file", b"0123") as fd, pipe() as (reader, writer):
        assert not is_readable(threads.fileno())
        assert (threads.pending(), threads.has_finished(), threads.collect_finished()) == (
            0,
            False,
            [],
        )
        threads.submit_read(reader, -1, bytearray(1), 1)
        threads.submit_read(fd, 0, bytearray(1), 2)
        threads.submit_read(fd, 0, bytearray(1), 3)
        assert (threads.pending(), threads.has_finished(), threads.collect_finished()) == (
            3,
            False,
            [],
        )
        assert not is_readable(threads.fileno())
        os.write(writer, b"x")
        assert is_readable(threads.fileno(), WAIT_SECONDS)
        assert threads.has_finished()
        assert threads.pending() == 3
        assert collect(threads, 3) == [(1, 1), (2, 1), (3, 1)]
        assert not is_readable(threads.fileno())
        assert (threads.pending(), threads.has_finished(), threads.collect_finished()) == (
            0,
            False,
            [],
        )
        assert not os.get_inheritable(threads.fileno())


def test_the_duration_is_that_of_the_system_call(tmp_path: Path) -> None:
    """The duration counts neither the wait for a thread nor that for the collector."""
    threads = make(1)
    with opened(tmp_path / "file", b"0123") as fd, pipe() as (reader, writer):
        since = time.monotonic_ns()
        threads.submit_read(reader, -1, bytearray(1), "slow")
        wait_until(lambda: is_reading(reader))
        threads.submit_read(fd, 0, bytearray(1), "fast")
        blocked = time.monotonic_ns()
        while time.monotonic_ns() < blocked + 20_000_000:
            pass
        held = time.monotonic_ns() - blocked
        os.write(writer, b"x")
        found: dict[object, int] = {}
        while len(found) < 2:
            found |= {tag: nanoseconds for tag, _, nanoseconds in threads.collect_finished()}
        total = time.monotonic_ns() - since
    assert held <= found["slow"] <= total
    assert found["fast"] <= total - held


def test_buffers_and_tags_are_held_until_they_are_collected() -> None:
    """A buffer cannot be resized, and a tag lives, until the call has been collected."""
    threads = make()
    with pipe() as (reader, writer):
        buffer, tag = bytearray(1), object()
        references = sys.getrefcount(tag)
        threads.submit_read(reader, -1, buffer, tag)
        assert is_held(buffer)
        assert sys.getrefcount(tag) == references + 1
        os.write(writer, b"x")
        assert is_readable(threads.fileno(), WAIT_SECONDS)
        assert is_held(buffer)
        found = threads.collect_finished()
        assert found[0][0] is tag
        assert not is_held(buffer)
        del found
        assert sys.getrefcount(tag) == references

        parts = (bytearray(b"a"), bytearray(b"b"))
        threads.submit_write(writer, 0, parts, tag)
        assert is_held(parts[0])
        assert is_held(parts[1])
        assert collect(threads) == [(tag, -errno.ESPIPE)]
        assert not is_held(parts[0])
        assert not is_held(parts[1])
        assert sys.getrefcount(tag) == references


def test_a_refused_submission_holds_nothing() -> None:
    """A wrong argument raises, and neither its tag nor any buffer stays held."""
    threads: Any = make()
    tag, buffer = object(), bytearray(4)
    references = sys.getrefcount(tag)
    wrong = new_capsule(1, b"another.answer", None)
    for error, call in (
        (BufferError, lambda: threads.submit_read(0, 0, b"read-only", tag)),
        (TypeError, lambda: threads.submit_read(0, 0, None, tag)),
        (TypeError, lambda: threads.submit_read("0", 0, buffer, tag)),
        (TypeError, lambda: threads.submit_read(0, 0.5, buffer, tag)),
        (OverflowError, lambda: threads.submit_read(1 << 31, 0, buffer, tag)),
        (OverflowError, lambda: threads.submit_read(0, 1 << 63, buffer, tag)),
        (ValueError, lambda: threads.submit_read(0, 0, buffer, tag, wrong)),
        (ValueError, lambda: threads.submit_read(0, 0, buffer, tag, answer=4)),
        (TypeError, lambda: threads.submit_read(0, 0, buffer, tag, other=None)),
        (TypeError, lambda: threads.submit_read(0, 0, buffer, answer=None)),
        (TypeError, lambda: threads.submit_read(0, 0, buffer, tag=tag)),
        (TypeError, lambda: threads.submit_read(0, 0, buffer, answer=None, other=tag)),
        (TypeError, lambda: threads.submit_read(0, 0, buffer, tag, None, None)),
        (TypeError, lambda: threads.submit_write(0, 0, [buffer], tag)),
        (TypeError, lambda: threads.submit_write(0, 0, (buffer, "text"), tag)),
        (TypeError, lambda: threads.submit_write(0, 0, (buffer,))),
        (TypeError, lambda: threads.submit_write(0, None, (buffer,), tag)),
        (TypeError, lambda: threads.submit_datasync(0)),
        (TypeError, lambda: threads.submit_datasync(None, tag)),
        (TypeError, lambda: threads.submit_truncate(0, tag)),
        (TypeError, lambda: threads.submit_truncate(0, None, tag)),
        (TypeError, lambda: threads.submit_fallocate(0, 0, 0, tag)),
        (OverflowError, lambda: threads.submit_fallocate(0, 1 << 40, 0, 1, tag)),
        (TypeError, lambda: threads.submit_fallocate(0, 0, 0, None, tag)),
    ):
        with pytest.raises(error):
            call()  # type: ignore[no-untyped-call]
        assert not is_held(buffer)
        assert sys.getrefcount(tag) == references
    assert (threads.pending(), threads.threads()) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        ((0,), ValueError),
        ((-1,), ValueError),
        ((1025,), ValueError),
        ((1, -1.0), ValueError),
        ((1, float("nan")), ValueError),
        ((1, float("inf")), ValueError),
        ((1, None), TypeError),
    ],
)
def test_bounds_of_a_pool(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    """A pool with no thread, too many of them or no idle time is refused."""
    with pytest.raises(error):
        iothreads.IoThreads(*arguments)


# --- answers --------------------------------------------------------------------------------


def test_a_read_is_finished_before_its_answer_begins(tmp_path: Path) -> None:
    """The answer gets data and result after the read is on the list, and counts as pending."""
    threads = make()
    seen: list[tuple[bytes, int, bool, int, bool]] = []

    def answered(data: bytes, result: int) -> None:
        state = (threads.has_finished(), threads.pending())
        seen.append((data, result, *state, threading.current_thread() is threading.main_thread()))

    answer = Answer(answered)
    with opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(fd, 1, bytearray(8), "good", answer.capsule)
        assert collect(threads) == [("good", 3)]
        threads.submit_read(-1, 1, bytearray(8), "bad", answer=answer.capsule)
        assert collect(threads) == [("bad", -errno.EBADF)]
        threads.submit_read(fd, 0, bytearray(1), "none", answer=None)
        assert collect(threads) == [("none", 1)]
    assert answer.error is None
    assert seen == [(b"123", 3, True, 1, False), (b"", -errno.EBADF, True, 1, False)]


def test_a_buffer_outlives_its_answer(tmp_path: Path) -> None:
    """A read that is collected during its answer stays pending, and its buffer and capsule live."""
    threads = make()
    running, go = threading.Event(), threading.Event()

    def answered(_data: bytes, _result: int) -> None:
        running.set()
        assert go.wait(WAIT_SECONDS)

    answer = Answer(answered)
    buffer, tag, capsule = bytearray(4), object(), answer.capsule
    references = sys.getrefcount(tag), sys.getrefcount(capsule)
    with opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(fd, 0, buffer, tag, capsule)
        assert running.wait(WAIT_SECONDS)
        assert [one[:2] for one in threads.collect_finished()] == [(tag, 4)]
        assert (threads.collect_finished(), threads.has_finished(), threads.pending()) == (
            [],
            False,
            1,
        )
        assert is_held(buffer)
        assert sys.getrefcount(capsule) == references[1] + 1
        go.set()
        wait_until(lambda: threads.pending() == 0)
        assert is_held(buffer), "only a thread with the GIL may release it"
        assert threads.collect_finished() == []
        assert not is_held(buffer)
        assert (sys.getrefcount(tag), sys.getrefcount(capsule)) == references
        assert answer.error is None

        # The next submission releases it too.
        running.clear()
        go.clear()
        threads.submit_read(fd, 0, buffer, tag, capsule)
        assert running.wait(WAIT_SECONDS)
        assert len(threads.collect_finished()) == 1
        go.set()
        wait_until(lambda: threads.pending() == 0)
        threads.submit_datasync(fd, None)
        assert not is_held(buffer)
        assert collect(threads) == [(None, 0)]
    assert not is_readable(threads.fileno())


def test_an_answer_delays_no_other_call(tmp_path: Path) -> None:
    """A call that finishes while an answer runs makes the eventfd readable."""
    threads = make()
    running, go = threading.Event(), threading.Event()

    def answered(_data: bytes, _result: int) -> None:
        running.set()
        assert go.wait(WAIT_SECONDS)

    answer = Answer(answered)
    with opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(fd, 0, bytearray(4), "answered", answer.capsule)
        assert running.wait(WAIT_SECONDS)
        threads.submit_read(fd, 0, bytearray(3), "other")
        assert collect(threads, 2) == [("answered", 4), ("other", 3)]
        go.set()
        wait_until(lambda: threads.pending() == 0)
    assert answer.error is None


# --- threads --------------------------------------------------------------------------------


def test_the_number_of_threads_is_bounded() -> None:
    """More calls than threads wait in their order, and all are made."""
    threads = make(2)
    with pipe() as (reader, writer):
        for number in range(7):
            threads.submit_read(reader, -1, bytearray(1), number)
            assert threads.threads() == min(number + 1, 2)
        assert threads.pending() == 7
        os.write(writer, b"1234567")
        found = collect(threads, 7)
        assert sorted(found, key=repr) == [(number, 1) for number in range(7)]
        assert threads.threads() == 2


def test_calls_one_after_the_other_need_one_thread(tmp_path: Path) -> None:
    """No thread is created while another is idle or has just finished its call."""
    threads = make(8)
    with opened(tmp_path / "file", b"0123") as fd:
        for _ in range(50):
            threads.submit_read(fd, 0, bytearray(4), None)
            collect(threads)
            assert threads.threads() == 1


@pytest.mark.parametrize("idle_seconds", [0, 1e-9, 1e-3])
def test_idle_threads_end(tmp_path: Path, idle_seconds: float) -> None:
    """A thread without work ends after the idle time, and the next call creates another."""
    threads = make(4, idle_seconds=idle_seconds)
    with opened(tmp_path / "file", b"0123") as fd:
        for _ in range(20):
            for number in range(8):
                threads.submit_read(fd, 0, bytearray(4), number)
            collect(threads, 8)
            wait_until(lambda: threads.threads() == 0)


def test_an_idle_thread_sleeps_for_the_whole_idle_time(tmp_path: Path) -> None:
    """An idle pool makes no system call: its thread sleeps without waking up."""
    threads = make(4, idle_seconds=WAIT_SECONDS)
    with opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(fd, 0, bytearray(4), None)
        collect(threads)
    (number,) = pool_threads()

    def switches() -> str:
        return pool_threads()[number]["voluntary_ctxt_switches"]

    wait_until(lambda: pool_threads()[number]["State"].startswith("S"))
    asleep = switches()
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        assert switches() == asleep
    assert threads.threads() == 1


def test_threads_take_no_signals() -> None:
    """A thread of the pool blocks every signal that can be blocked."""
    threads = make()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pipe() as (reader, writer):
        threads.submit_read(reader, -1, bytearray(1), None)
        wait_until(lambda: is_reading(reader))
        for status in pool_threads().values():
            blocked = int(status["SigBlk"], 16)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGXFSZ):
                assert blocked >> (number - 1) & 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        os.write(writer, b"x")
        collect(threads)


# --- the end of a pool ----------------------------------------------------------------------


def test_a_pool_with_calls_in_flight_is_freed_without_waiting(tmp_path: Path) -> None:
    """Calls not begun or not collected are released; those in progress end later, unseen."""
    threads = make(1)
    fileno = threads.fileno()
    done, flying, queued = bytearray(1), bytearray(1), bytearray(4)
    tag = object()
    references = sys.getrefcount(tag)
    with opened(tmp_path / "file", b"0123") as fd, pipe() as (reader, writer):
        threads.submit_read(fd, 0, done, tag)
        threads.submit_read(reader, -1, flying, None)
        threads.submit_write(fd, 0, (queued,), tag)
        wait_until(lambda: is_reading(reader))
        del threads
        gc.collect()
        assert sys.getrefcount(tag) == references
        assert (is_held(done), is_held(flying), is_held(queued)) == (False, True, False)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fileno)
        os.write(writer, b"x")
        wait_until(lambda: flying == b"x")
        wait_until(lambda: not pool_threads())
        assert os.pread(fd, 4, 0) == b"0123", "a call that had not begun was made"


def test_a_transfer_ends_with_its_pool() -> None:
    """After the pool is freed a short transfer is not continued: the descriptor may be reused."""
    threads = make(1)
    buffer = bytearray(8)
    with pipe() as (reader, writer):
        threads.submit_read(reader, -1, buffer, None)
        wait_until(lambda: is_reading(reader))
        del threads
        os.write(writer, b"0123")
        wait_until(lambda: not pool_threads())
        os.write(writer, b"45")
        assert os.read(reader, 9) == b"45"
        assert buffer == b"0123\0\0\0\0"


@pytest.mark.parametrize("is_collected", [False, True])
def test_a_pool_may_be_freed_during_an_answer(tmp_path: Path, *, is_collected: bool) -> None:
    """The buffer of an answer that runs while the pool is freed stays valid."""
    threads = make()
    running, go, over = threading.Event(), threading.Event(), threading.Event()
    buffer = bytearray(4)

    def answered(_data: bytes, _result: int) -> None:
        running.set()
        assert go.wait(WAIT_SECONDS)
        assert is_held(buffer)
        over.set()

    answer = Answer(answered)
    with opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(fd, 0, buffer, None, answer.capsule)
        assert running.wait(WAIT_SECONDS)
        if is_collected:
            assert len(threads.collect_finished()) == 1
        del threads
        go.set()
        assert over.wait(WAIT_SECONDS)
        wait_until(lambda: not pool_threads())
    assert answer.error is None


def test_no_answer_begins_after_the_pool_is_freed() -> None:
    """A read that ends after its pool is not answered: what it answers to may be gone as well."""
    threads = make()
    answered: list[int] = []
    answer = Answer(lambda _data, result: answered.append(result))
    with pipe() as (reader, writer):
        threads.submit_read(reader, -1, bytearray(1), None, answer.capsule)
        wait_until(lambda: is_reading(reader))
        del threads
        os.write(writer, b"x")
        wait_until(lambda: not pool_threads())
    assert answered == []


def test_pools_leave_neither_threads_nor_descriptors(tmp_path: Path) -> None:
    """A pool that is freed closes its eventfd and ends its idle threads."""
    descriptors = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with opened(tmp_path / "file", b"0123") as fd:
        for _ in range(50):
            threads = make()
            for number in range(4):
                threads.submit_read(fd, 0, bytearray(4), number)
            del threads
    wait_until(lambda: not pool_threads())
    wait_until(lambda: set(os.listdir("/proc/self/fd")) == descriptors)  # noqa: PTH208


def test_a_forked_child_may_free_the_pool_but_not_use_it() -> None:
    """In a forked child calls are refused, and freeing the pool neither waits nor crashes."""
    threads = make()
    with pipe() as (reader, writer):
        threads.submit_read(reader, -1, bytearray(1), None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forks beside threads
            child = os.fork()
        if child == 0:
            code = 1
            try:
                refused = 0
                for call in (threads.collect_finished, threads.threads):
                    try:
                        call()
                    except RuntimeError:
                        refused += 1
                try:
                    threads.submit_datasync(reader, None)
                except RuntimeError:
                    refused += 1
                del call, threads
                code = 0 if refused == 3 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.write(writer, b"x")
        assert collect(threads) == [(None, 1)]


def test_no_thread_can_be_created() -> None:
    """If no thread runs, a call is refused and holds nothing; the next call creates a thread."""
    threads = make()
    tag, buffer = object(), bytearray(1)
    references = sys.getrefcount(tag)

    def submit() -> None:
        threads.submit_read(reader, -1, buffer, tag)

    with pipe() as (reader, writer):
        with pytest.raises(PermissionError):
            run_without(CLONE3, submit)
        assert (threads.pending(), threads.threads()) == (0, 0)
        assert not is_held(buffer)
        assert sys.getrefcount(tag) == references
        submit()
        os.write(writer, b"x")
        assert collect(threads) == [(tag, 1)]


def test_no_second_thread_can_be_created(tmp_path: Path) -> None:
    """If a thread is busy and no other can be created, the busy thread makes the call later."""
    threads = make()
    with pipe() as (reader, writer), opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(reader, -1, bytearray(1), "first")
        run_without(CLONE3, lambda: threads.submit_read(fd, 0, bytearray(4), "second"))
        assert threads.threads() == 1
        os.write(writer, b"x")
        assert collect(threads, 2) == [("first", 1), ("second", 4)]


def test_the_call_is_made_while_no_thread_can_be_created(tmp_path: Path) -> None:
    """If the busy thread makes the call and ends before the creation fails, the call counts."""
    threads = make(idle_seconds=0)
    buffer = bytearray(4)
    with pipe() as (reader, writer), opened(tmp_path / "file", b"0123") as fd:
        threads.submit_read(reader, -1, bytearray(1), "first")
        tasks = Path(f"/proc/{os.getpid()}/task")

        def end_the_busy_thread() -> None:
            os.write(writer, b"x")
            wait_until(lambda: not pool_threads(tasks))

        run_with_late_refusal(
            CLONE3, end_the_busy_thread, lambda: threads.submit_read(fd, 0, buffer, "second")
        )
        assert threads.threads() == 0
        assert is_held(buffer)
        assert collect(threads, 2) == [("first", 1), ("second", 4)]
        assert (bytes(buffer), threads.pending()) == (b"0123", 0)
        assert not is_held(buffer)


@pytest.mark.parametrize("seed", range(4))
def test_many_calls_in_any_order(tmp_path: Path, seed: int) -> None:
    """Random reads and writes, some of them answered, each report once and move their bytes."""
    chance = random.Random(seed)
    threads = make(chance.choice((1, 2, 8)), idle_seconds=chance.choice((0, 1e-6, 5.0)))
    block = 4096
    content = bytearray(chance.randbytes(64 * block))
    answers: dict[int, tuple[bytes, int]] = {}
    expected: dict[int, tuple[bytearray, bytes]] = {}
    kept = []
    results: dict[object, int] = {}
    with opened(tmp_path / "file", content) as fd:
        busy: set[int] = set()
        blocks: dict[int, int] = {}
        for number in range(600):
            free = [index for index in range(64) if index not in busy]
            index = chance.choice(free)
            offset = index * block
            busy.add(index)
            blocks[number] = index
            if chance.random() < 0.4:
                data = chance.randbytes(block)
                content[offset : offset + block] = data
                cut = chance.randrange(block)
                threads.submit_write(fd, offset, (data[:cut], data[cut:]), number)
            else:
                buffer = bytearray(block)
                expected[number] = buffer, bytes(content[offset : offset + block])
                answer = None
                if chance.random() < 0.5:
                    answer = Answer(
                        lambda data, result, number=number: answers.update({number: (data, result)})  # type: ignore[misc]
                    )
                    kept.append((number, answer))
                threads.submit_read(
                    fd, offset, memoryview(buffer), number, answer and answer.capsule
                )
            while len(busy) > 48 or (busy and chance.random() < 0.3):
                for tag, result, _ in threads.collect_finished():
                    assert isinstance(tag, int)
                    assert tag not in results
                    results[tag] = result
                    busy.remove(blocks[tag])
        while len(results) < 600:
            assert is_readable(threads.fileno(), WAIT_SECONDS)
            results |= {tag: result for tag, result, _ in threads.collect_finished()}
        wait_until(lambda: threads.pending() == 0)
        assert os.pread(fd, len(content), 0) == content
    assert set(results.values()) == {block}
    assert all(buffer == data for buffer, data in expected.values())
    assert len(kept) > 50
    assert answers == {number: (expected[number][1], block) for number, _ in kept}
    assert all(answer.error is None for _, answer in kept)
