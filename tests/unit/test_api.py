"""Images as file objects: the promises of a file object, and what the image file holds."""

from __future__ import annotations

import errno
import gc
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import qedfuse
from qedfuse import api
from qedfuse.disk.disk import Disk
from qedfuse.errors import (
    CorruptImageError,
    HostError,
    ImageInUseError,
    NoSpaceError,
    NotQedError,
    UsageError,
)
from qedfuse.ondisk.constants import Feature
from qedfuse.ondisk.header import Header, build_header, parse_header
from qedfuse.util import portal
from qedfuse.util.latch import Latch
from qedfuse.util.portal import Portal
from qedfuse.util.portalcall import PortalClosedError
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

ROOT = Path(qedfuse.__file__).parents[1]
SIZE = 1 << 20
CLUSTER = 4096


def new_image(path: Path, size: int = SIZE, table_size: int = 1) -> Path:
    """Make an empty image of small clusters."""

    async def make() -> None:
        await qedfuse.create_image(str(path), size, cluster_size=CLUSTER, table_size=table_size)

    trio.run(make)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make an empty image."""
    return new_image(tmp_path / "image.qed")


def header_of(path: Path) -> Header:
    """Return the header in the file."""
    return parse_header(path.read_bytes()[:64], "image")


def threads() -> list[str]:
    """Name the threads of open files."""
    return [thread.name for thread in threading.enumerate() if "image.qed" in thread.name]


def test_write_and_read_back(image: Path) -> None:
    """Bytes written at unaligned offsets read back after the file was reopened."""
    with qedfuse.open(image, "r+b") as disk:
        assert (disk.size, disk.mode, disk.name) == (SIZE, "r+b", str(image))
        assert disk.readable()
        assert disk.writable()
        assert disk.seekable()
        assert disk.seek(12345) == 12345
        assert disk.write(b"odd") == 3
        assert disk.tell() == 12348
    assert disk.closed
    with qedfuse.open(image) as disk:
        assert not disk.writable()
        disk.seek(12343)
        assert disk.read(7) == b"\0\0odd\0\0"
        assert disk.seek(-3, os.SEEK_END) == SIZE - 3
        assert disk.read(100) == bytes(3)
        assert disk.read(100) == b""
        assert disk.seek(0) == 0
        assert disk.read() == bytes(12345) + b"odd" + bytes(SIZE - 12348)
    assert threads() == []


def test_end_of_the_disk(image: Path) -> None:
    """A write is cut short at the end of the disk, and past the end there is no space."""
    with qedfuse.open(image, "r+b") as disk:
        disk.seek(SIZE - 2)
        assert disk.write(b"1234") == 2
        assert disk.tell() == SIZE
        for position in (SIZE, SIZE + 5000):
            disk.seek(position)
            with pytest.raises(NoSpaceError) as caught:
                disk.write(b"x")
            assert caught.value.errno == errno.ENOSPC
            assert disk.tell() == position
            assert disk.write(b"") == 0
            assert disk.read(1) == b""
            assert disk.readinto(bytearray(5)) == 0


def test_long_transfers_are_split_into_calls(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of several calls is joined correctly, and a write that meets the end is short."""
    monkeypatch.setattr(api, "_MAX_CALL_BYTES", 5000)
    data = bytes(range(256)) * (SIZE // 256)
    with qedfuse.open(image, "r+b") as disk:
        disk.seek(100)
        assert disk.write(data) == SIZE - 100
        disk.seek(0)
        assert disk.read() == bytes(100) + data[:-100]
        buffer = bytearray(SIZE + 1)
        disk.seek(0)
        assert disk.readinto(buffer) == SIZE
        assert buffer == bytes(100) + data[:-100] + b"\0"


def test_write_past_the_end_is_short_at_a_call_boundary(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is too long is short, not an error, also if a call ends at the end."""
    monkeypatch.setattr(api, "_MAX_CALL_BYTES", CLUSTER)
    with qedfuse.open(image, "r+b") as disk:
        disk.seek(SIZE - 2 * CLUSTER)
        assert disk.write(bytes(3 * CLUSTER)) == 2 * CLUSTER


def test_buffers_of_other_shapes(image: Path) -> None:
    """Any object with the buffer protocol can be written and filled, counted in bytes."""
    with qedfuse.open(image, "r+b") as disk:
        assert disk.write(memoryview(struct.pack("<2Q", 1, 2)).cast("Q")) == 16
        disk.seek(0)
        words = memoryview(bytearray(16)).cast("Q")
        assert disk.readinto(words) == 16
        assert list(words) == [1, 2]


def test_truncate_grows(image: Path) -> None:
    """truncate() grows the disk to a size or to the position, keeps its content, never shrinks."""
    with qedfuse.open(image, "r+b") as disk:
        disk.seek(SIZE - 1)
        disk.write(b"x")
        assert disk.truncate(2 * SIZE) == 2 * SIZE
        assert disk.tell() == SIZE
        assert disk.read() == bytes(SIZE)
        disk.seek(3 * SIZE)
        assert disk.truncate() == 3 * SIZE == disk.size
        assert disk.truncate(3 * SIZE) == 3 * SIZE
        for size in (SIZE, 3 * SIZE + 1):
            with pytest.raises(UsageError) as caught:
                disk.truncate(size)
            assert caught.value.errno == errno.EINVAL
    assert header_of(image).image_size == 3 * SIZE
    with qedfuse.open(image) as disk:
        disk.seek(SIZE - 1)
        assert disk.read(2) == b"x\0"


@pytest.mark.parametrize("mode", ["r", "w", "wb", "rb+", "r+", "a", "", None])
def test_other_modes_are_refused(image: Path, mode: str) -> None:
    """Only rb and r+b are accepted as modes."""
    with pytest.raises(ValueError, match=r"^mode: found .*, expected 'rb' or 'r\+b'$"):
        qedfuse.open(image, mode)  # type: ignore[arg-type]


def test_read_only_file_is_not_written(image: Path) -> None:
    """A file opened with rb refuses changes as other file objects do."""
    before = image.read_bytes()
    writing = qedfuse.OpenOptions(writable=True)  # the mode decides
    with qedfuse.open(image, "rb", options=writing) as disk:
        with pytest.raises(io.UnsupportedOperation):
            disk.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            disk.truncate(2 * SIZE)
        disk.flush()
        with pytest.raises(io.UnsupportedOperation):
            disk.fileno()
        assert not disk.isatty()
    assert image.read_bytes() == before


def test_bad_positions(image: Path) -> None:
    """A negative position and an unknown whence are refused."""
    with qedfuse.open(image) as disk:
        for offset, whence in ((-1, 0), (-1, 1), (-SIZE - 1, 2), (0, 7)):
            with pytest.raises(ValueError, match=r"found -?[0-9]+, expected"):
                disk.seek(offset, whence)
        assert disk.tell() == 0


def test_integers_of_other_types(tmp_path: Path) -> None:
    """Positions and lengths can be integers of numpy, whose sums would overflow; floats cannot."""
    size = (1 << 31) + SIZE
    with qedfuse.open(new_image(tmp_path / "large.qed", size, 2), "r+b") as disk:
        for kind in (np.int32, np.uint32, np.int64):
            assert disk.seek(kind(2**31 - CLUSTER)) == 2**31 - CLUSTER
            assert disk.read(kind(2 * CLUSTER)) == bytes(2 * CLUSTER)
            assert disk.tell() == disk.seek(kind(0), os.SEEK_CUR) == (1 << 31) + CLUSTER
            assert type(disk.tell()) is int
            assert disk.write(b"x") == 1
        assert disk.truncate(np.int64(size + 512)) == size + 512
        position = disk.tell()
        for use in (disk.seek, disk.read, disk.truncate):
            with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
                use(4096.5)  # type: ignore[arg-type]
        assert (disk.tell(), disk.size) == (position, size + 512)


def test_a_child_keeps_the_locks(image: Path) -> None:
    """After a close in the parent, the image is locked until its child has ended."""
    program = """
import os, sys, warnings
import qedfuse
from qedfuse.errors import ImageInUseError
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
disk = qedfuse.open(sys.argv[1], "r+b")
end, keep = os.pipe()
child = os.fork()
if not child:
    os.close(keep)
    os.read(end, 1)
    os._exit(0)
disk.close()
try:
    qedfuse.open(sys.argv[1], "r+b")
except ImageInUseError:
    print("locked", flush=True)
os.close(keep)
os.waitpid(child, 0)
qedfuse.open(sys.argv[1], "r+b").close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, image],
        capture_output=True, timeout=60, check=True, cwd=ROOT, text=True,
    )  # fmt: skip
    assert done.stdout == "locked\n"


@pytest.mark.parametrize(
    "use",
    [
        lambda disk: disk.read(1),
        lambda disk: disk.readinto(bytearray(1)),
        lambda disk: disk.write(b"x"),
        lambda disk: disk.seek(0),
        lambda disk: disk.tell(),
        lambda disk: disk.truncate(SIZE),
        lambda disk: disk.flush(),
        lambda disk: disk.readable(),
        lambda disk: disk.__enter__(),
    ],
)
def test_closed_file(image: Path, use: Callable[[qedfuse.DiskFile], object]) -> None:
    """Every operation on a closed file fails, except closing it."""
    disk = qedfuse.open(image, "r+b")
    disk.close()
    disk.close()
    with pytest.raises(ValueError, match="closed"):
        use(disk)


def test_cannot_be_copied(image: Path) -> None:
    """A file object with a thread behind it can neither be copied nor pickled."""
    with qedfuse.open(image) as disk, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(disk)


def test_errors_at_open_are_raised_in_the_caller(tmp_path: Path) -> None:
    """A failed open raises its own error in the caller, and leaves no thread behind."""
    path = tmp_path / "image.qed"
    with pytest.raises(HostError) as caught:
        qedfuse.open(path)
    assert caught.value.errno == errno.ENOENT
    path.write_bytes(bytes(CLUSTER))
    with pytest.raises(NotQedError):
        qedfuse.open(os.fsencode(path), "r+b")
    assert threads() == []


def test_locks_last_until_close(image: Path) -> None:
    """A writer excludes other openers, also in its own process, until it is closed."""
    with qedfuse.open(image, "r+b") as disk:
        with pytest.raises(ImageInUseError, match=rf"\(pid {os.getpid()}\)"):
            qedfuse.open(image)
        shared = qedfuse.OpenOptions(force_share=True)
        with qedfuse.open(image, options=shared) as other:
            assert other.read(1) == b"\0"
        disk.write(b"x")
    with qedfuse.open(image) as one, qedfuse.open(image) as two:
        assert one.read(1) == two.read(1) == b"x"


def test_flush_puts_everything_into_the_file(image: Path, tmp_path: Path) -> None:
    """After a flush the image file holds everything, and after a close NEED_CHECK is clear."""
    copy = tmp_path / "copy.qed"
    with qedfuse.open(image, "r+b") as disk:
        disk.write(b"flushed")
        disk.flush()
        shutil.copy(image, copy)
        with qedfuse.open(copy) as other:
            assert other.read(7) == b"flushed"
        assert header_of(image).need_check
    assert not header_of(image).need_check


@pytest.mark.expect_log("failing: ")
def test_a_flush_after_a_failure_of_the_event_loop_raises(image: Path) -> None:
    """A flush reports no success if the event loop of the file has failed."""
    failing = threading.Event()

    @asynccontextmanager
    async def open_and_fail() -> AsyncIterator[qedfuse.Disk]:
        async def fail() -> None:
            await trio.to_thread.run_sync(failing.wait)
            raise LookupError

        async with (
            qedfuse.open_disk(str(image), qedfuse.OpenOptions(writable=True)) as disk,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(fail)
            yield disk

    portal = Portal(open_and_fail(), "failing")
    disk = api.DiskFile(portal, "r+b")
    disk.write(b"lost?")
    (thread,) = (one for one in threading.enumerate() if one.name == "failing")
    failing.set()
    thread.join(60)
    assert not portal.is_alive()
    with pytest.raises(PortalClosedError):
        disk.flush()
    with pytest.raises(ExceptionGroup):
        disk.close()
    assert disk.closed


def test_works_with_the_io_module(image: Path) -> None:
    """Buffered and text layers and shutil accept a disk like any raw file."""
    with qedfuse.open(image, "r+b") as raw, io.BufferedRandom(raw) as buffered:
        buffered.write(b"line one\nline two\n")
        buffered.seek(0)
        assert buffered.readline() == b"line one\n"
        assert buffered.peek(4)[:4] == b"line"
    with qedfuse.open(image) as disk:
        copied = io.BytesIO()
        shutil.copyfileobj(disk, copied)
        assert copied.getvalue() == b"line one\nline two\n" + bytes(SIZE - 18)
    with io.TextIOWrapper(io.BufferedReader(qedfuse.open(image)), encoding="ascii") as text:
        assert text.readline() == "line one\n"


def test_threads_share_a_file(image: Path) -> None:
    """Writes of several threads are atomic: none is lost, and none overlaps another."""
    with qedfuse.open(image, "r+b") as disk:

        def work(number: int) -> None:
            for _ in range(20):
                assert disk.write(bytes([number]) * 100) == 100

        workers = [threading.Thread(target=work, args=(number,)) for number in range(1, 6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert disk.tell() == 5 * 20 * 100
        disk.seek(0)
        records = [disk.read(100) for _ in range(100)]
    assert sorted(records) == [bytes([number]) * 100 for number in range(1, 6) for _ in range(20)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError])
def test_an_interrupted_close_can_be_repeated(
    image: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """A signal handler's exception in a close leaves the file open; another close waits."""
    disk = qedfuse.open(image, "r+b")
    disk.write(b"kept")

    def interrupted(_: Latch) -> None:
        monkeypatch.setattr(Latch, "wait", wait)
        raise error

    wait = Latch.wait
    monkeypatch.setattr(Latch, "wait", interrupted)
    with pytest.raises(error):
        disk.close()
    was_closed = disk.closed
    disk.close()
    assert (was_closed, disk.closed) == (False, True)
    assert not header_of(image).need_check


@pytest.mark.expect_log("failing: ")
def test_an_interrupted_close_loses_no_error(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error of a close that was interrupted is logged, and raised by another close."""
    interrupted = threading.Event()

    @asynccontextmanager
    async def open_and_fail() -> AsyncIterator[qedfuse.Disk]:
        async with qedfuse.open_disk(str(image), qedfuse.OpenOptions(writable=True)) as disk:
            yield disk
            await trio.to_thread.run_sync(interrupted.wait)
        raise LookupError

    def interrupt(_: Latch) -> None:
        monkeypatch.undo()
        raise SystemExit

    disk = api.DiskFile(Portal(open_and_fail(), "failing"), "r+b")
    monkeypatch.setattr(Latch, "wait", interrupt)
    with pytest.raises(SystemExit):
        disk.close()
    interrupted.set()
    with pytest.raises(LookupError):
        disk.close()
    assert disk.closed
    assert [record.getMessage() for record in caplog.records] == ["failing: "]


def test_an_interrupted_write_is_over(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C in a write, nothing of it lands on newer data, and its buffer is free."""
    write, buffer = Disk.write, bytearray(b"A" * 2 * CLUSTER)
    has_begun, is_interrupted = threading.Event(), threading.Event()
    under_way: list[int] = []

    async def slow(disk: Disk, start: int, data: memoryview) -> int:
        under_way.append(start)
        try:
            done = await write(disk, start, data[:CLUSTER])
            has_begun.set()
            if data[0] == ord("A"):
                await trio.to_thread.run_sync(is_interrupted.wait)
                await trio.lowlevel.checkpoint()
            return done + await write(disk, start + CLUSTER, data[CLUSTER:])
        finally:
            under_way.remove(start)

    def interrupt(_: Latch) -> None:
        monkeypatch.setattr(Latch, "wait", wait)
        assert has_begun.wait(60)
        is_interrupted.set()
        raise KeyboardInterrupt

    with qedfuse.open(image, "r+b") as disk:
        wait = Latch.wait
        monkeypatch.setattr(Disk, "write", slow)
        monkeypatch.setattr(Latch, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            disk.write(buffer)
        assert under_way == [], "the write goes on"
        assert disk.tell() == 0
        buffer += b"can be resized"
        disk.write(b"B" * 2 * CLUSTER)
        disk.flush()
        disk.seek(0)
        assert disk.read(2 * CLUSTER) == b"B" * 2 * CLUSTER


@pytest.mark.parametrize("other", [False, True], ids=["own thread", "thread of another file"])
def test_a_buffered_file_that_is_finalized_in_the_thread_of_a_portal(
    image: Path, tmp_path: Path, *, other: bool
) -> None:
    """A garbage-collected wrapper writes its buffer and closes the file, and nothing hangs."""
    raw = qedfuse.open(image, "r+b")
    (thread,) = [one for one in threading.enumerate() if "image.qed" in one.name]
    second = qedfuse.open(new_image(tmp_path / "other.qed"))
    collector = second._portal if other else raw._portal
    buffered = io.BufferedRandom(raw)
    buffered.write(b"buffered")
    cycle = [buffered]
    cycle.append(cycle)  # type: ignore[arg-type]
    gc.disable()
    try:
        del buffered, cycle  # not ``raw``, whose finalizer could run first
        collector.call_soon(gc.collect)
        thread.join(60)
    finally:
        gc.enable()
    assert not thread.is_alive(), "the finalizer hangs"
    second.close()
    assert not header_of(image).need_check
    with qedfuse.open(image) as disk:
        assert disk.read(8) == b"buffered"


def test_a_finalizer_in_the_thread_of_a_portal_waits_for_no_other_thread(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrapper is collected in the event loop while another thread is inside a read."""
    inside, go_on, read = threading.Event(), threading.Event(), Disk.read

    async def held(disk: Disk, start: int, length: int) -> bytes | bytearray:
        inside.set()
        await trio.to_thread.run_sync(go_on.wait)
        return await read(disk, start, length)

    raw = qedfuse.open(image, "r+b")
    (thread,) = [one for one in threading.enumerate() if "image.qed" in one.name]
    buffered = io.BufferedRandom(raw)
    assert buffered.read(1) == bytes(1)
    buffered.write(b"buffered")  # its flush seeks back to the second byte of the disk
    monkeypatch.setattr(Disk, "read", held)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(raw.read(4)))
    reader.start()
    assert inside.wait(60)
    cycle = [buffered]
    cycle.append(cycle)  # type: ignore[arg-type]
    gc.disable()
    try:
        del buffered, cycle
        raw._portal.call_soon(gc.collect)
        raw._portal.call_soon(go_on.set)
        assert go_on.wait(60), "the finalizer hangs"
    finally:
        gc.enable()
    reader.join()
    thread.join(60)
    assert not thread.is_alive(), "the finalizer has not closed the file"
    raw.close()
    assert found == [bytes(4)]
    with qedfuse.open(image) as disk:
        assert disk.read(9) == b"\0buffered"


def test_a_finalizer_that_moves_the_position_does_not_move_a_write(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long read or write takes its parts from one place, also if a finalizer seeks meanwhile."""
    monkeypatch.setattr(api, "_MAX_CALL_BYTES", 512)
    with qedfuse.open(image, "r+b") as disk:
        for name in ("call", "call_to_end"):
            method = getattr(Portal, name)

            def moving(self: Portal[Disk], *args: object, method: object = method) -> object:
                disk._position = CLUSTER
                return method(self, *args)  # type: ignore[operator]

            monkeypatch.setattr(Portal, name, moving)
        assert disk.write(b"a" * 1024) == 1024
        assert disk.tell() == 1024
        disk.seek(0)
        assert disk.read(1024) == b"a" * 1024
        assert disk.tell() == 1024
        disk.seek(0)
        assert disk.readinto(bytearray(1024)) == 1024
        assert disk.tell() == 1024


@pytest.mark.parametrize("place", ["loop", "worker", "worker between calls", "own thread"])
def test_a_finalizer_in_a_thread_that_a_portal_waits_for(image: Path, place: str) -> None:
    """A portal whose task waits for the thread of a finalizer writes, closes and ends."""
    raw = qedfuse.open(image, "r+b")
    (thread,) = [one for one in threading.enumerate() if "image.qed" in one.name]
    wrappers: list[object] = [io.BufferedWriter(raw)]
    wrappers[0].write(b"buffered")  # type: ignore[attr-defined]
    seen: list[int] = []

    def drop() -> None:
        seen.append(threading.get_ident())
        wrappers.clear()

    def collect() -> None:
        cycle = [wrappers.pop()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        drop()

    async def wait_for_thread() -> None:
        token, has_ended = trio.lowlevel.current_trio_token(), trio.Event()

        def end(_: object = None) -> None:
            token.run_sync_soon(has_ended.set)

        def drop_and_end() -> None:
            drop()
            end()

        if place == "loop":
            drop()
        elif place == "worker":
            await trio.to_thread.run_sync(drop)
        elif place == "own thread":
            start_thread(drop_and_end)
            await has_ended.wait()
        else:  # such a function has no context, like the code of trio around a call
            trio.lowlevel.start_thread_soon(collect, end)
            await has_ended.wait()

    gc.disable()
    try:
        raw._portal.start(wait_for_thread)
        thread.join(60)
    finally:
        gc.enable()
    assert not thread.is_alive(), "the finalizer hangs"
    assert not wrappers
    assert (seen == [thread.ident]) == (place == "loop")
    assert not header_of(image).need_check
    with qedfuse.open(image) as disk:
        assert disk.read(8) == b"buffered"


def test_a_close_that_is_interrupted_while_another_thread_reads_goes_on(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C while close() waits for a read of another thread, the close goes on."""
    inside, go_on, read = threading.Event(), threading.Event(), Disk.read

    async def held(disk: Disk, start: int, length: int) -> bytes | bytearray:
        inside.set()
        await trio.to_thread.run_sync(go_on.wait)
        return await read(disk, start, length)

    class Interrupted:
        """A lock whose wait is interrupted."""

        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None:
            pytest.fail("the lock was not taken")

    monkeypatch.setattr(Disk, "read", held)
    disk = qedfuse.open(image, "r+b")
    (thread,) = [one for one in threading.enumerate() if "image.qed" in one.name]
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(disk.read(4)))
    reader.start()
    inside.wait()
    lock = disk._lock
    monkeypatch.setattr(disk, "_lock", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        disk.close()
    go_on.set()
    reader.join()
    thread.join(60)
    assert not thread.is_alive(), "the close does not go on"
    assert found == [bytes(4)]
    monkeypatch.setattr(disk, "_lock", lock)
    disk.close()
    assert disk.closed


def test_no_secret_in_the_error_if_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The message names a URL without its user and its query."""

    def refuse(_thread: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(portal, "start", refuse)
    with pytest.raises(HostError) as caught:
        qedfuse.open("https://user:password@host/x.qed?signature")
    assert str(caught.value).startswith("https://...: open: ")
    assert "password" not in str(caught.value)
    assert "signature" not in str(caught.value)


def test_forgotten_file_is_closed_with_a_warning(image: Path) -> None:
    """A garbage-collected file emits a ResourceWarning, and its image is closed cleanly."""
    disk = qedfuse.open(image, "r+b")
    disk.write(b"kept")
    running = [thread for thread in threading.enumerate() if "image.qed" in thread.name]
    with pytest.warns(ResourceWarning, match=r"unclosed disk '.*image\.qed'"):
        del disk  # the last reference
    for thread in running:
        thread.join()
    assert not header_of(image).need_check
    with qedfuse.open(image, "r+b") as again:
        assert again.read(4) == b"kept"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_forgotten_file_is_closed_if_warnings_are_errors(image: Path) -> None:
    """A garbage-collected file is closed even if its ResourceWarning becomes an exception."""
    disk = qedfuse.open(image, "r+b")
    running = [thread for thread in threading.enumerate() if "image.qed" in thread.name]
    assert running
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del disk  # the last reference
    for thread in running:
        thread.join()
    with qedfuse.open(image, "r+b") as again:
        assert again.read(4) == bytes(4)


@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_program_that_ends_without_closing(image: Path, end: str, code: int) -> None:
    """A program that exits in any way leaves a clean image with everything it wrote."""
    program = f"""
import qedfuse, sys
disk = qedfuse.open(sys.argv[1], "r+b")
disk.write(b"kept")
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program, image],
        capture_output=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == code
    assert not header_of(image).need_check
    with qedfuse.open(image) as disk:
        assert disk.read(4) == b"kept"


def test_a_fork_while_a_thread_is_inside_a_read(image: Path) -> None:
    """A child has no operation that hangs: reads raise, and flush and close have no effect."""
    program = """
import os, signal, sys, threading, warnings
import qedfuse
from qedfuse.disk.disk import Disk

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
inside, go_on, read = threading.Event(), threading.Event(), Disk.read

async def held(disk, *args):
    inside.set()
    go_on.wait()
    return await read(disk, *args)

Disk.read = held
disk = qedfuse.open(sys.argv[1], "r+b")
found = []
reader = threading.Thread(target=lambda: found.append(disk.read(4)))
reader.start()
inside.wait()
child = os.fork()
if not child:
    signal.alarm(30)
    assert disk.seek(8) == 8
    for call in (lambda: disk.read(4), lambda: disk.write(b"data"), lambda: disk.truncate(1 << 22)):
        try:
            call()
        except RuntimeError as error:
            print(error)
    disk.flush()
    disk.close()
    assert disk.closed
    print("closed", flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
go_on.set()
reader.join()
print(status, found, disk.tell(), flush=True)
disk.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, image],
        capture_output=True, timeout=60, check=True, cwd=ROOT, text=True,
    )  # fmt: skip
    failure = "the event loop that the call needs is ending, has ended, or runs in another process"
    assert done.stdout == f"{failure}\n" * 3 + f"closed\n0 [{bytes(4)!r}] 4\n"


def mark_dirty(path: Path) -> None:
    """Set NEED_CHECK, as a program that died while writing leaves it."""
    header = header_of(path)
    assert not header.features & Feature.NEED_CHECK
    with path.open("r+b") as file:
        file.write(build_header(header.with_need_check(value=True)))


@pytest.mark.expect_log("leaked clusters found by the check: 3; no errors in the tables")
def test_dirty_image_with_leaks_only_is_opened(image: Path) -> None:
    """An image with NEED_CHECK and only leaks is checked and then opened."""
    with qedfuse.open(image, "r+b") as disk:
        disk.write(b"kept")
    mark_dirty(image)
    with image.open("ab") as file:
        file.write(bytes(3 * CLUSTER))
    with qedfuse.open(image, "r+b") as disk:
        assert disk.read(4) == b"kept"
    assert not header_of(image).need_check


def test_dirty_image_with_errors_is_refused(image: Path) -> None:
    """An image with NEED_CHECK and errors opens for reading only, and is not changed."""
    with qedfuse.open(image, "r+b") as disk:
        disk.write(b"kept" * CLUSTER)
    mark_dirty(image)
    with image.open("r+b") as file:
        (table,) = struct.unpack("<Q", file.read()[CLUSTER : CLUSTER + 8])
        file.seek(table + 8)
        file.write(struct.pack("<Q", table + 1))  # no multiple of a cluster
    before = image.read_bytes()
    with pytest.raises(CorruptImageError) as caught:
        qedfuse.open(image, "r+b")
    message = str(caught.value)
    assert message.startswith(f"{image}: was not closed cleanly: not opened for writing: ")
    assert "the check found 1 error (first: " in message
    assert "\n" not in message
    with qedfuse.open(image) as disk:
        assert disk.read(4) == b"kept"
    assert image.read_bytes() == before


steps = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(0, 70_000)),
        st.tuples(st.just("read"), st.integers(-1, 9000)),
        st.tuples(st.just("readinto"), st.integers(0, 9000)),
        st.tuples(st.just("write"), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("fill"), st.integers(1, 9000)),
        st.tuples(st.just("flush"), st.none()),
    ),
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(steps)
def test_agrees_with_a_file_in_memory(
    tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[str, object]]
) -> None:
    """Any sequence of operations gives the same results as a file of fixed size in memory."""
    size = 65536
    path = new_image(tmp_path_factory.mktemp("model") / "image.qed", size)
    model = io.BytesIO(bytes(size))
    with qedfuse.open(path, "r+b") as disk:
        for name, value in todo:
            if name in ("write", "fill"):
                data = value if isinstance(value, bytes) else b"\xaa" * int(str(value))
                room = max(0, size - model.tell())
                if room:
                    assert disk.write(data) == model.write(data[:room])
            elif name == "readinto":
                ours, theirs = (bytearray(int(str(value))) for _ in range(2))
                assert disk.readinto(ours) == model.readinto(theirs)
                assert ours == theirs
            elif name != "flush":
                assert getattr(disk, name)(value) == getattr(model, name)(value)
            else:
                disk.flush()
            assert disk.tell() == model.tell()
    with qedfuse.open(path) as disk:
        assert disk.read() == model.getvalue()
