"""Reads by native threads on connections of their own, and servers that answer wrongly."""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, cast

import pytest

from qedfuse.foreign import directreads
from qedfuse.hostio.nativecalls import make_io_threads
from tests.support import extensions

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.foreign.process import QemuNbd
    from qedfuse.hostio._iothreads import IoThreads

pytestmark = pytest.mark.skipif(not extensions.EXPECTED, reason="needs the extension")

OFFSET: Final = 3 << 32
DATA: Final = bytes(range(256)) * 16
MAGIC: Final = 0x67446698


def answer(server: socket.socket, make: Callable[[bytes], bytes]) -> None:
    """Receive a request, send what ``make`` returns for its cookie, and close the connection."""
    request = server.recv(28, socket.MSG_WAITALL)
    magic, flags, command, cookie, offset, length = struct.unpack(">IHH8sQI", request)
    assert (magic, flags, command, offset) == (0x25609513, 0, 0, OFFSET)
    assert length == len(DATA)
    server.sendall(make(cookie))
    server.close()


def read(make: Callable[[bytes], bytes]) -> tuple[int, bytes]:
    """Read from a server that answers what ``make`` returns; return the result and the buffer."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=answer, args=(theirs, make))
    thread.start()
    threads = cast("IoThreads[str]", make_io_threads())
    buffer = bytearray(len(DATA))
    threads.submit_export_read(ours.fileno(), OFFSET, buffer, "tag")
    assert select.select([threads.fileno()], [], [], 20)[0]
    ((tag, result, _nanoseconds),) = threads.finished()
    thread.join()
    ours.close()
    assert tag == "tag"
    return result, bytes(buffer)


def test_right_answer() -> None:
    """The data of a right answer fills the buffer."""
    found = read(lambda cookie: struct.pack(">II", MAGIC, 0) + cookie + DATA)
    assert found == (len(DATA), DATA)


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (lambda _cookie: b"", errno.ECONNRESET),
        (lambda cookie: struct.pack(">II", MAGIC, 0) + cookie[:3], errno.ECONNRESET),
        (lambda cookie: struct.pack(">II", MAGIC, 0) + cookie + DATA[:-1], errno.ECONNRESET),
        (lambda cookie: struct.pack(">II", MAGIC, 5) + cookie, errno.EIO),
        (lambda cookie: struct.pack(">II", MAGIC + 1, 0) + cookie + DATA, errno.EIO),
        (lambda cookie: struct.pack(">II", MAGIC, 0) + cookie[::-1] + DATA, errno.EIO),
    ],
)
def test_wrong_answer(make: Callable[[bytes], bytes], number: int) -> None:
    """A wrong answer is an error, never other bytes."""
    result, _buffer = read(make)
    assert result == -number


def test_silent_server() -> None:
    """A server that does not answer is an error after the time that the socket allows."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50_000))
    threads = cast("IoThreads[str]", make_io_threads())
    threads.submit_export_read(ours.fileno(), OFFSET, bytearray(512), "tag")
    assert select.select([threads.fileno()], [], [], 20)[0]
    assert threads.finished()[0][1] == -errno.EAGAIN
    theirs.close()
    ours.close()


def test_lengths() -> None:
    """An empty buffer, and one of more than 32 MiB, are refused without a request."""
    ours, theirs = socket.socketpair()
    threads = cast("IoThreads[str]", make_io_threads())
    for length in (0, (32 << 20) + 1):
        threads.submit_export_read(ours.fileno(), 0, bytearray(length), "tag")
        assert select.select([threads.fileno()], [], [], 20)[0]
        assert threads.finished()[0][1] == -errno.EINVAL
    theirs.settimeout(0)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    theirs.close()
    ours.close()


def test_connections_after_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """After as many failed reads as there are connections, new connections are made."""
    made: list[socket.socket] = []
    are_made = threading.Event()

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        made.append(theirs)
        return ours

    def fail(
        _fd: int, _at: int, _view: memoryview, _tag: object, ended: Callable[..., object]
    ) -> None:
        ended(-errno.EIO, 0)

    class Connecting(threading.Thread):
        def run(self) -> None:
            super().run()
            are_made.set()

    calls = SimpleNamespace(can_start_reads=True, start_export_read=fail)
    monkeypatch.setattr(directreads, "host_calls", lambda: calls)
    monkeypatch.setattr("qedfuse.foreign.directreads.threading.Thread", Connecting)
    server = cast("QemuNbd", SimpleNamespace(connect_negotiated=connect, name="x"))
    reads = directreads.DirectReads(server, 1 << 20, 1)
    results: list[int] = []

    def start() -> bool:
        return reads.try_start(0, memoryview(bytearray(4096)), object, results.append)

    for number in (1, 2):
        assert not start()
        assert are_made.wait(20)
        are_made.clear()
        assert len(made) == 16 * number
        assert [start() for _ in range(16)] == [True] * 16
        assert results == [-errno.EIO] * 16 * number
    reads.close()
    for connection in made:
        connection.close()
