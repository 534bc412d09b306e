"""Reads, writes and fsyncs that the extension answers, or passes to pyfuse3's own operations."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import weakref
from typing import TYPE_CHECKING, BinaryIO

import pytest

from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.handles import HANDLE_DIRECT, HANDLE_WRITER
from tests.support.fusewire import (
    FSYNC,
    FSYNC_SLOT,
    READ,
    READ_SLOT,
    WRITE,
    WRITE_SLOT,
    Operation,
    Wire,
    session_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qedfuse.hostio._iothreads import IoThreads
    from qedfuse.mount.fuse._extraops import Request

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

iothreads = pytest.importorskip("qedfuse.hostio._iothreads", reason="the extension was not built")

HANDLE = HANDLE_DIRECT | HANDLE_WRITER | 5
OFFSET = 1 << 45
WRITE_CACHE = 1
"""FUSE_WRITE_CACHE of linux/fuse.h."""
FH_OFFSET = 16
"""Offset of ``fh`` in struct fuse_file_info."""
WriteOperation = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t),
    ctypes.c_int64,
    ctypes.c_void_p,
)


class Pyfuse3:
    """The operations of pyfuse3, which count their calls and answer nothing.

    Attributes:
        wire: The session.
        calls: The names of the operations that were called, in their order.
        write_handles: The handles of the writes.
    """

    def __init__(self) -> None:
        """Make a session with the three operations."""
        self.calls: list[str] = []
        self.write_handles: list[int] = []
        self._read = Operation(lambda _request, _inode: self.calls.append("read"))
        self._write = WriteOperation(self._record_write)
        self._fsync = Operation(lambda _request, _inode: self.calls.append("fsync"))
        self.wire = Wire(
            filled={READ_SLOT: self._read, WRITE_SLOT: self._write, FSYNC_SLOT: self._fsync}
        )

    def read(self, size: int) -> int:
        """Send a read of ``size`` bytes at `OFFSET`; return the number of the request."""
        return self.wire.send(READ, struct.pack("=QQIIQII", HANDLE, OFFSET, size, 0, 0, 0, 0))

    def _record_write(self, *arguments: int) -> None:
        self.calls.append("write")
        self.write_handles.append(ctypes.c_uint64.from_address(arguments[-1] + FH_OFFSET).value)

    def write(self, data: bytes, write_flags: int = 0) -> int:
        """Send a write of ``data`` at `OFFSET`; return the number of the request."""
        head = struct.pack("=QQIIQII", HANDLE, OFFSET, len(data), write_flags, 0, 0, 0)
        return self.wire.send(WRITE, head + data)

    def fsync(self) -> int:
        """Send an fsync; return the number of the request."""
        return self.wire.send(FSYNC, struct.pack("=QII", HANDLE, 1, 0))


@pytest.fixture
def pyfuse3() -> Iterator[Pyfuse3]:
    """Make a session with operations of pyfuse3, and end it."""
    with session_of(Pyfuse3()) as made:
        yield made


def serve(
    read: Callable[[int, int, int], memoryview | None] | None = None,
    write: Callable[[int, int, memoryview], bool] | None = None,
    fsync: Callable[[int], bool] | None = None,
) -> None:
    """Let functions try to answer."""
    assert extraops._extension is not None
    extraops._extension.set_data_handlers(read, write, fsync)


def test_a_read_is_answered_with_the_view_that_the_function_returns(pyfuse3: Pyfuse3) -> None:
    """A read gets the bytes of the returned view, and pyfuse3 gets no request."""
    asked: list[tuple[int, int, int]] = []

    def read(handle: int, offset: int, size: int) -> memoryview:
        asked.append((handle, offset, size))
        return memoryview(b"0123456789")[:size]

    serve(read=read)
    number = pyfuse3.read(8)
    assert asked == [(HANDLE, OFFSET, 8)]
    assert pyfuse3.wire.answers == [(number, 0, b"01234567")]
    assert pyfuse3.calls == []


def test_a_write_that_the_function_carries_out_is_answered_in_full(pyfuse3: Pyfuse3) -> None:
    """A write after which the function returns True is answered with its length."""
    written: list[tuple[int, int, bytes]] = []

    def write(handle: int, offset: int, data: memoryview) -> bool:
        written.append((handle, offset, bytes(data)))
        return True

    serve(write=write)
    number = pyfuse3.write(b"guest data")
    assert written == [(HANDLE, OFFSET, b"guest data")]
    assert pyfuse3.wire.answers == [(number, 0, struct.pack("=II", 10, 0))]
    assert pyfuse3.calls == []


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_write_from_the_cache_has_the_flags_of_no_handle(
    pyfuse3: Pyfuse3, *, is_cached: bool
) -> None:
    """pyfuse3 gets a write from the kernel's cache without the flags for O_DIRECT and writers."""
    pyfuse3.write(b"guest data", WRITE_CACHE if is_cached else 0)
    cleared = HANDLE_DIRECT | HANDLE_WRITER
    assert HANDLE & cleared == cleared
    assert pyfuse3.write_handles == [HANDLE & ~cleared if is_cached else HANDLE]


def test_an_fsync_that_the_function_carries_out_is_answered(pyfuse3: Pyfuse3) -> None:
    """An fsync for which the function returns True is answered with success."""
    serve(fsync=lambda handle: handle == HANDLE)
    number = pyfuse3.fsync()
    assert pyfuse3.wire.answers == [(number, 0, b"")]
    assert pyfuse3.calls == []


def decline(*_arguments: object) -> None:
    """Answer nothing."""


def fail(*_arguments: object) -> None:
    """Raise."""
    msg = "no"
    raise ValueError(msg)


def return_a_number(*_arguments: object) -> int:
    """Return something that is neither a buffer nor True."""
    return 7


@pytest.mark.parametrize("function", [decline, fail, return_a_number, None])
def test_what_a_function_does_not_answer_goes_to_pyfuse3(
    function: Callable[..., None] | None, pyfuse3: Pyfuse3
) -> None:
    """A request that a function declines, or for which it raises, is passed to pyfuse3 once."""
    serve(function, function, function)  # type: ignore[arg-type]
    pyfuse3.read(8)
    pyfuse3.write(b"guest data")
    pyfuse3.fsync()
    assert pyfuse3.calls == ["read", "write", "fsync"]
    assert pyfuse3.wire.answers == []


def test_the_view_of_the_data_ends_with_the_call(pyfuse3: Pyfuse3) -> None:
    """The extension keeps no reference to the view of the data that it passes to a function."""
    views: list[weakref.ref[memoryview]] = []

    def write(_handle: int, _offset: int, data: memoryview) -> bool:
        views.append(weakref.ref(data))
        assert data.readonly
        return True

    serve(write=write)
    pyfuse3.write(b"guest data")
    assert views[0]() is None


def test_a_table_without_the_operations_stays_as_it_is() -> None:
    """If pyfuse3 lacks one of the three operations, the extension replaces none of them."""
    calls: list[int] = []
    reader = Operation(lambda _request, inode: calls.append(inode))
    wire = Wire(filled={READ_SLOT: reader})
    serve(read=lambda *_: memoryview(b"x"))
    try:
        wire.send(READ, bytes(40))
    finally:
        extraops.end()
        wire.close()
    assert calls == [5]
    assert wire.answers == []


class DeferredReads:
    """Defers every read, and keeps what answers it.

    Attributes:
        pending: What answers the reads, oldest first.
    """

    def __init__(self) -> None:
        """Start without reads."""
        self.pending: list[Request] = []

    def __call__(self, *_arguments: int) -> None:
        """Defer the read that is being handled."""
        self.pending.append(extraops.defer_read())


@pytest.fixture
def reads(pyfuse3: Pyfuse3) -> Iterator[DeferredReads]:
    """Defer all reads of the session."""
    assert not pyfuse3.calls
    deferred = DeferredReads()
    serve(read=deferred)
    yield deferred
    deferred.pending.clear()


def finish(threads: IoThreads[str], count: int = 1) -> list[int]:
    """Wait until ``count`` calls have finished and their answers have returned."""
    results: list[int] = []
    while len(results) < count:
        select.select([threads.fileno()], [], [])
        results += [result for _, result, _ in threads.collect_finished()]
    while threads.pending():
        os.sched_yield()
    return results


def test_a_deferred_read_is_answered_by_the_thread_that_reads(
    pyfuse3: Pyfuse3, reads: DeferredReads, tmp_path: Path
) -> None:
    """A deferred read is answered by a native thread, and pyfuse3 does not get it."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    number = pyfuse3.read(8)
    threads: IoThreads[str] = iothreads.IoThreads(1)
    with path.open("rb") as file:
        view = memoryview(bytearray(8))
        threads.submit_read(file.fileno(), 1, view, "tag", answer=reads.pending[0].capsule())
        assert finish(threads) == [8]
    assert pyfuse3.wire.answers == [(number, 0, b"12345678")]
    assert pyfuse3.calls == []
    reads.pending.clear()
    assert len(pyfuse3.wire.answers) == 1, "it was answered once"


def test_a_short_read_is_left_to_the_event_loop(
    pyfuse3: Pyfuse3, reads: DeferredReads, tmp_path: Path
) -> None:
    """If a thread reads fewer bytes, or fails, it does not answer, and the event loop can."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    first, second = pyfuse3.read(8), pyfuse3.read(8)
    threads: IoThreads[str] = iothreads.IoThreads(1)
    short, failed = reads.pending
    with path.open("rb") as file, path.open("ab") as unreadable:
        for fd, pending in ((file.fileno(), short), (unreadable.fileno(), failed)):
            threads.submit_read(fd, 5, memoryview(bytearray(8)), "", answer=pending.capsule())
        assert finish(threads, 2) == [5, -errno.EBADF]
    assert pyfuse3.wire.answers == []
    short.data(b"slow path")
    failed.error(errno.EIO)
    for pending in reads.pending:
        pending.error(errno.ENOENT)
        pending.data(b"again")
    assert pyfuse3.wire.answers == [(first, 0, b"slow path"), (second, -errno.EIO, b"")]


def test_a_deferred_read_that_is_freed_is_answered_with_eintr(
    pyfuse3: Pyfuse3, reads: DeferredReads
) -> None:
    """A deferred read whose objects are freed without an answer fails with EINTR."""
    number = pyfuse3.read(8)
    capsule = reads.pending[0].capsule()
    reads.pending.clear()
    assert pyfuse3.wire.answers == [], "the capsule keeps it"
    del capsule
    assert pyfuse3.wire.answers == [(number, -errno.EINTR, b"")]


@pytest.mark.parametrize("by", ["thread", "event loop"])
def test_a_deferred_read_outlives_its_session(
    by: str, pyfuse3: Pyfuse3, reads: DeferredReads, tmp_path: Path
) -> None:
    """After the end of its session a deferred read is not answered, by whomever."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    pyfuse3.read(8)
    pending = reads.pending.pop()
    extraops.end()
    if by == "thread":
        threads: IoThreads[str] = iothreads.IoThreads(1)
        with path.open("rb") as file:
            view = memoryview(bytearray(8))
            threads.submit_read(file.fileno(), 0, view, "", answer=pending.capsule())
            assert finish(threads) == [8]
    else:
        pending.data(b"late")
    del pending
    assert pyfuse3.wire.answers == []


def test_a_function_that_defers_a_read_and_raises_has_deferred_it(pyfuse3: Pyfuse3) -> None:
    """A read that was deferred does not go to pyfuse3, whatever the function does after that."""
    kept: list[Request] = []

    def defer_and_raise(*_arguments: int) -> memoryview:
        kept.append(extraops.defer_read())
        msg = "no"
        raise ValueError(msg)

    serve(read=defer_and_raise)
    number = pyfuse3.read(8)
    assert (pyfuse3.calls, pyfuse3.wire.answers) == ([], [])
    kept.pop().data(b"x")
    assert pyfuse3.wire.answers == [(number, 0, b"x")]


def test_only_a_read_that_is_being_handled_can_be_deferred(pyfuse3: Pyfuse3) -> None:
    """Outside of a read, and a second time in the same read, there is nothing to defer."""
    errors: list[str] = []

    def defer_twice(*_arguments: int) -> None:
        pending = extraops.defer_read()
        with pytest.raises(RuntimeError, match="no read is being handled"):
            extraops.defer_read()
        pending.data(b"x")
        errors.append("second")

    with pytest.raises(RuntimeError, match="no read is being handled"):
        extraops.defer_read()
    serve(read=defer_twice)
    pyfuse3.read(8)
    assert errors == ["second"]


@pytest.fixture
def cached_file(tmp_path: Path) -> Iterator[BinaryIO]:
    """Return an open file of 128 KiB whose pages are in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 17))
    with path.open("r+b") as file:
        yield file


def test_a_reply_from_a_file_is_made_only_if_nothing_waits(
    pyfuse3: Pyfuse3, cached_file: BinaryIO
) -> None:
    """A read past the end of the file, or of pages that are not cached, is not answered."""
    results: list[bool] = []
    fd = cached_file.fileno()

    def read(_handle: int, _offset: int, size: int) -> memoryview:
        results.append(extraops.reply_from_file(fd, (1 << 17) - size + 1))
        return memoryview(b"copied")

    serve(read=read)
    number = pyfuse3.read(1 << 16)
    assert results == [False]
    assert pyfuse3.wire.answers == [(number, 0, b"copied")]
    with pytest.raises(RuntimeError, match="no read is being handled"):
        extraops.reply_from_file(fd, 0)
