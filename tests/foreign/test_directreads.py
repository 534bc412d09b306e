"""Reads by native threads on connections of their own, and servers that answer wrongly."""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final, cast

import pytest

from qedfuse.hostio.nativecalls import make_io_threads
from tests.support import extensions

if TYPE_CHECKING:
    from collections.abc import Callable

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
