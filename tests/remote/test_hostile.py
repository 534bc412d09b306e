"""Responses that no honest web server sends: each ends in one line, in bounded time and memory."""

from __future__ import annotations

import re
import resource
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.errors import RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import Deadlines, RemoteOptions
from tests.support.remotes import read, some_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

CONTENT: Final = some_bytes(1)
SIZE: Final = len(CONTENT)
ENDLESS: Final = 1 << 40
"""How many bytes an endless part of a response has."""
DEADLINES: Final = Deadlines(1, 1, 0.5)
FIELDS: Final = b'ETag: "one"\r\nLast-Modified: Sun, 09 Sep 2001 01:46:40 GMT\r\n'


def repeated(block: bytes, length: int = ENDLESS) -> Iterator[bytes]:
    """Yield a block again and again, until the client closes the connection."""
    many = block * max((1 << 16) // len(block), 1)
    for _ in range(0, length, len(many)):
        yield many


@dataclass
class HostileServer:
    """A server on loopback that sends bytes of the test.

    Attributes:
        responses: Returns what is sent for a request for a range, given its first and last byte.
        sent: How many bytes were sent on each connection.
    """

    port: int
    responses: Callable[[int, int], Iterable[bytes]]
    sent: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The URL of the object."""
        return f"http://127.0.0.1:{self.port}/disk.qed"

    def serve(self, connection: socket.socket) -> None:
        """Answer the requests of a connection; close it after an answer that says so."""
        number = len(self.sent)
        self.sent.append(0)
        with connection, suppress(OSError):
            while request := connection.recv(1 << 16):
                found = re.search(rb"bytes=(\d+)-(\d+)", request)
                assert found is not None
                for block in self.responses(int(found[1]), int(found[2])):
                    if not block:
                        return
                    connection.sendall(block)
                    self.sent[number] += len(block)


@contextmanager
def serving(responses: Callable[[int, int], Iterable[bytes]]) -> Iterator[HostileServer]:
    """Run a server for the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = HostileServer(listener.getsockname()[1], responses)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=server.serve, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def head(first: int, last: int, *fields: bytes, status: bytes = b"HTTP/1.1 206 x") -> bytes:
    """Return the head of a response with a range, without its last line."""
    ranged = b"Content-Range: bytes %d-%d/%d\r\n" % (first, last, SIZE)
    return status + b"\r\n" + ranged + FIELDS + b"".join(line + b"\r\n" for line in fields)


def body(first: int, last: int) -> bytes:
    """Return a range of the object."""
    return CONTENT[first : last + 1]


def length(first: int, last: int) -> bytes:
    """Return the header with the length of a range."""
    return b"Content-Length: %d" % (last + 1 - first)


CHUNKED: Final = b"Transfer-Encoding: chunked"


def chunked(first: int, last: int, end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a response in chunks that ends with ``end``."""
    data = body(first, last)
    return head(first, last, CHUNKED) + b"\r\n%x\r\n%b\r\n" % (len(data), data) + end


REFUSED: Final[dict[str, Callable[[int, int], Iterable[bytes]]]] = {
    "a header line without an end": lambda a, b: _joined(head(a, b) + b"X: ", repeated(b"y")),
    "headers without an end": lambda a, b: _joined(head(a, b), repeated(b"X: y\r\n")),
    "a status line without an end": lambda _a, _b: repeated(b"H"),
    "interim responses without an end": lambda _a, _b: repeated(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers without an end": lambda a, b: _joined(chunked(a, b, b"0\r\n"), repeated(b"X: y\r\n")),
    "a trailer line without an end": lambda a, b: _joined(
        chunked(a, b, b"0\r\nX: "), repeated(b"y")
    ),
    "a chunk extension without an end": lambda a, b: _joined(
        head(a, b, CHUNKED) + b"\r\n1;", repeated(b"y")
    ),
    "a chunk of negative length": lambda a, b: [
        head(a, b, CHUNKED) + b"\r\n-1\r\n" + bytes(1 << 20),
        b"",
    ],
    "a chunk that is too long": lambda a, b: _joined(
        head(a, b, CHUNKED) + b"\r\nffffffffffffffff\r\n", repeated(b"y")
    ),
    "a chunk without a number": lambda a, b: [
        head(a, b, CHUNKED) + b"\r\nxyz\r\n" + body(a, b),
        b"",
    ],
    "two lengths": lambda a, b: [
        head(a, b, length(a, b), b"Content-Length: 7") + b"\r\n" + body(a, b),
        b"",
    ],
    "several ranges": lambda a, b: [
        b"HTTP/1.1 206 x\r\nContent-Type: multipart/byteranges; boundary=x\r\n"
        + FIELDS
        + length(a, b)
        + b"\r\n\r\n"
        + body(a, b),
        b"",
    ],
    "two headers with a range": lambda a, b: [
        head(a, b, b"Content-Range: bytes 0-0/1", length(a, b)) + b"\r\n" + body(a, b)
    ],
    "an encoding": lambda a, b: [
        head(a, b, b"Content-Encoding: gzip", length(a, b)) + b"\r\n" + body(a, b)
    ],
    "nothing": lambda _a, _b: [b""],
    "switching protocols": lambda _a, _b: [b"HTTP/1.1 101 x\r\nUpgrade: x\r\n\r\n", b""],
    "a long redirection": lambda _a, _b: [
        b"HTTP/1.1 302 x\r\nContent-Length: 0\r\nLocation: https://x/" + b"y" * 60_000 + b"\r\n\r\n"
    ],
}
"""Responses that are an error."""


def _joined(start: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    """Yield some bytes and then others."""
    yield start
    yield from rest


ACCEPTED: Final[dict[str, Callable[[int, int], Iterable[bytes]]]] = {
    "HTTP/1.0": lambda a, b: [
        head(a, b, length(a, b), status=b"HTTP/1.0 206 x") + b"\r\n" + body(a, b),
        b"",
    ],
    "no length": lambda a, b: [head(a, b, b"Connection: close") + b"\r\n" + body(a, b), b""],
    "an interim response": lambda a, b: [b"HTTP/1.1 100 x\r\n\r\n" + chunked(a, b)],
    "further interim responses": lambda a, b: [
        b"HTTP/1.1 103 x\r\nLink: </a.css>; rel=preload\r\n\r\nHTTP/1.1 102 x\r\n\r\n",
        b"HTTP/1.1 100 x\r\n\r\nHTTP/1.1 199 x\r\n\r\n" + chunked(a, b),
    ],
    "trailers": lambda a, b: [
        chunked(a, b, b'0\r\nETag: "two"\r\nContent-Range: bytes 0-0/1\r\n\r\n')
    ],
    # A client that kept the connection would take the rest for the next response.
    "a rest that looks like a response": lambda a, b: [
        head(a, b, length(a, b)) + b"\r\n" + body(a, b),
        head(a, b, length(a, b)) + b"\r\n" + bytes(b + 1 - a),
    ],
}
"""Responses that are unusual, and of which the right bytes are used."""


def options(cache: Path) -> RemoteOptions:
    """Return options with short deadlines."""
    return RemoteOptions(cache_directory=str(cache), deadlines=DEADLINES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_at_the_opening(name: str, tmp_path: Path) -> None:
    """A response that no server may send is one short line, after at most the time of a read."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(REFUSED[name]) as server:
        with pytest.raises(RemoteError) as caught:
            open_remote(parse_address(server.url), options(tmp_path))
        assert server.sent
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    message = str(caught.value)
    assert message.startswith(f"{server.url}: ")
    assert len(message) < 1000
    assert message.isprintable()


@pytest.mark.expect_log("what is not in the cache cannot be read")
@pytest.mark.expect_log("answers again")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_later(name: str, tmp_path: Path) -> None:
    """The same response for a range is an error of the read, and the next read succeeds."""
    is_hostile = False

    def respond(first: int, last: int) -> Iterable[bytes]:
        if is_hostile:
            return REFUSED[name](first, last)
        return [head(first, last, length(first, last)) + b"\r\n" + body(first, last)]

    with serving(respond) as server:
        file = open_remote(parse_address(server.url), options(tmp_path))
        try:
            is_hostile = True
            with pytest.raises(RemoteError) as caught:
                read(file, 0, SIZE)
            assert str(caught.value).isprintable()
            is_hostile = False
            assert read(file, 0, SIZE) == CONTENT
        finally:
            file.close()


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_unusual(name: str, tmp_path: Path) -> None:
    """Of an unusual response exactly the bytes of the range are used."""
    with serving(ACCEPTED[name]) as server:
        file = open_remote(parse_address(server.url), options(tmp_path))
        try:
            for unit in range(0, SIZE, 1 << 18):
                assert read(file, unit, 1 << 18) == CONTENT[unit : unit + (1 << 18)]
        finally:
            file.close()
