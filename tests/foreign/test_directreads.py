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
from qedfuse.util.threads import HelperThread
from tests.support import extensions
from tests.support.refusedcalls import CLONE3, run_without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
    ((tag, result, _nanoseconds),) = threads.collect_finished()
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
    assert threads.collect_finished()[0][1] == -errno.EAGAIN
    theirs.close()
    ours.close()


def test_lengths() -> None:
    """An empty buffer, and one of more than 32 MiB, are refused without a request."""
    ours, theirs = socket.socketpair()
    threads = cast("IoThreads[str]", make_io_threads())
    for length in (0, (32 << 20) + 1):
        threads.submit_export_read(ours.fileno(), 0, bytearray(length), "tag")
        assert select.select([threads.fileno()], [], [], 20)[0]
        assert threads.collect_finished()[0][1] == -errno.EINVAL
    theirs.settimeout(0)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    theirs.close()
    ours.close()


class Connections:
    """Direct reads of a server whose reads all fail, and which may refuse connections.

    Attributes:
        ours: The reader's ends of the connections.
        made: The server's ends of the connections.
        attempts: How often a connection was requested.
        accepted: How many more connections the server accepts.
        now: The time in seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 1) -> None:
        """Make the reads, with this timeout; no connection is made yet."""
        self.ours: list[socket.socket] = []
        self.made: list[socket.socket] = []
        self.attempts = 0
        self.accepted = 1 << 10
        self.now = 1000.0
        self._ended = ended = threading.Event()

        class Connecting(HelperThread):
            def run(self) -> None:
                super().run()
                if self.name == "qedfuse nbd":
                    ended.set()

        calls = SimpleNamespace(can_start_reads=True, start_export_read=self._fail)
        monkeypatch.setattr(directreads, "host_calls", lambda: calls)
        monkeypatch.setattr(directreads, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("qedfuse.util.threads.HelperThread", Connecting)
        server = cast("QemuNbd", SimpleNamespace(connect_negotiated=self._connect, name="x"))
        self.reads = directreads.DirectReads(server, 1 << 20, seconds)
        self.results: list[int] = []

    def start(self) -> bool:
        """Start a read; return whether there was a connection."""
        return self.reads.try_start(0, memoryview(bytearray(4096)), object, self.results.append)

    def start_and_wait(self) -> None:
        """Start a read that finds no connection, and wait for the thread that makes connections."""
        assert not self.start()
        assert self._ended.wait(20)
        self._ended.clear()

    def close(self) -> None:
        """Close both ends of all connections."""
        self.reads.close()
        for connection in self.made:
            connection.close()

    def _connect(self) -> socket.socket:
        self.attempts += 1
        if not self.accepted:
            raise TimeoutError
        self.accepted -= 1
        ours, theirs = socket.socketpair()
        self.ours.append(ours)
        self.made.append(theirs)
        return ours

    @staticmethod
    def _fail(
        _fd: int, _at: int, _view: memoryview, _tag: object, ended: Callable[..., object]
    ) -> None:
        ended(-errno.EIO, 0)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connections]:
    """Give direct reads of a server, and close them afterwards."""
    found = Connections(monkeypatch)
    yield found
    found.close()


def test_connections_after_failures(connections: Connections) -> None:
    """After as many failed reads as there are connections, new connections are made."""
    for number in (1, 2):
        connections.start_and_wait()
        assert len(connections.made) == 16 * number
        assert [connections.start() for _ in range(16)] == [True] * 16
        assert connections.results == [-errno.EIO] * 16 * number


@pytest.mark.parametrize("seconds", [1e-9, 0.25, 0.9999999, 1, 1.5, 600])
def test_every_connection_has_a_timeout(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Reads and writes of a connection have the given timeout, also if it is below a second."""
    connections = Connections(monkeypatch, seconds)
    connections.start_and_wait()
    assert len(connections.ours) == 16
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        raw = connections.ours[0].getsockopt(socket.SOL_SOCKET, option, 16)
        whole, micros = struct.unpack("ll", raw)
        # The kernel rounds up to ticks, of at most 10 ms.
        assert (whole, micros) != (0, 0)
        assert seconds - 2e-6 <= whole + micros / 1e6 <= seconds + 0.02
    connections.close()


def test_pauses_after_no_connection(connections: Connections) -> None:
    """If no connection can be made, reads try again after pauses that grow up to a minute."""
    connections.accepted = 0
    pauses = (1, 2, 4, 8, 16, 32, 60, 60)
    for number, pause in enumerate(pauses, start=1):
        connections.start_and_wait()
        connections.now += pause - 0.5
        assert not connections.start()
        assert connections.attempts == number
        connections.now += 0.5
    connections.accepted = 3
    connections.start_and_wait()
    assert [connections.start() for _ in range(3)] == [True] * 3
    # The connections are lost, and the pause is short again.
    connections.start_and_wait()
    connections.now += 1
    connections.accepted = 1
    connections.start_and_wait()
    assert connections.start()


def test_no_thread_that_connects(connections: Connections) -> None:
    """If the host cannot start a thread, a read takes the slow path, and later ones try again."""
    assert not run_without(CLONE3, connections.start)
    assert not connections.start()
    assert connections.attempts == 0
    connections.now += 1
    connections.start_and_wait()
    assert connections.start()
