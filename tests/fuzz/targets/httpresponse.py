"""Responses of web servers: the bytes of the range and version that were asked for, or an error.

The client is the real one, on urllib3; what the server sends is in a socket before the request.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from qedfuse.remote.address import parse_address
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    ClientOptions,
    MissingError,
    UnusableError,
    Version,
)
from qedfuse.remote.deadline import _TimedHTTPConnection, _TimedHTTPPool
from qedfuse.remote.webclient import WebClient
from tests.fuzz.targets.target import Target, assert_line

if TYPE_CHECKING:
    from collections.abc import Callable

_URL: Final = "http://127.0.0.1/disk"
_LENGTH: Final = 8
_SIZE: Final = 100
_VERSION: Final = Version(_SIZE, '"abc"', 1.0e9)
_TIMED: Final = Version(_SIZE, "", 1.0e9)
_DATE: Final = b"Last-Modified: Sun, 09 Sep 2001 01:46:40 GMT\r\n"


_sent = b""
"""What the server sends on each connection."""
_servers: Final[list[socket.socket]] = []


class _Connection(_TimedHTTPConnection):
    """A connection whose server has already sent everything, and has closed its side."""

    def _new_conn(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.sendall(_sent)
        theirs.shutdown(socket.SHUT_WR)
        _servers.append(theirs)
        ours.settimeout(float(self.timeout or 0))
        return ours


class _Pool(_TimedHTTPPool):
    ConnectionCls = _Connection


def check(data: bytes) -> None:
    """Read a range, and the version, from a server that sends an input after its first byte."""
    global _sent  # noqa: PLW0603  a connection is made by urllib3, which passes no argument
    _sent = data[1:]
    version = _TIMED if data[:1] and data[0] % 2 else _VERSION
    client = WebClient(parse_address(_URL), ClientOptions())
    manager = client._pools.pool_for(client._address)
    manager.pool_classes_by_scheme = {"http": _Pool}
    try:
        content = _result(lambda: next(client._get(4, [_LENGTH], version)))
        if content is not None:
            assert isinstance(content, bytearray)
            assert len(content) == _LENGTH
            assert bytes(content) in data or b"chunked" in data.lower()
        found = _result(lambda: client._query()[0])
        if found is not None:
            assert isinstance(found, Version)
            assert 0 <= found.size < 10**18
            assert found.etag.isprintable()
            assert found.is_same(found)
    finally:
        manager.clear()
        while _servers:
            _servers.pop().close()


def _result(call: Callable[[], object]) -> object:
    """Return the result of a call of the client; None after one of the client's exceptions."""
    try:
        return call()
    except (AttemptError, ChangedError, MissingError, UnusableError) as error:
        if str(error):
            assert_line(error)
    return None


def seeds() -> list[bytes]:
    """Return responses with a range, in chunks, with other statuses, and with a redirection."""
    body = b"\r\n01234567"
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 4-11/100\r\n"
    length, etag = b"Content-Length: 8\r\n", b'ETag: "abc"\r\n'
    chunks = b"Transfer-Encoding: chunked\r\n\r\n4\r\n0123\r\n4\r\n4567\r\n0\r\n\r\n"
    first = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-0/100\r\nContent-Length: 1\r\n"
    return [
        b"\0" + head + etag + length + body,
        b"\1" + head + _DATE + b"Date: Sun, 09 Sep 2001 01:47:40 GMT\r\n" + length + body,
        b"\0" + head + etag + body,
        b"\0" + head + etag + chunks,
        b"\0" + first + etag + _DATE + b"\r\n0",
        b"\0HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n",
        b"\0HTTP/1.1 416 No\r\nContent-Range: bytes */0\r\nContent-Length: 0\r\n\r\n",
        b"\0HTTP/1.1 503 No\r\nRetry-After: 1\r\n\r\n",
        b"\0" + head + etag + b"Content-Encoding: gzip\r\n" + length + body,
    ]


TARGET: Final = Target(
    check,
    seeds,
    (
        b"\r\n",
        b"\r\n\r\n",
        b"HTTP/1.1 ",
        b"bytes ",
        b"bytes */",
        b"W/",
        b"Content-Length: ",
        b"-1",
        b"Content-Range: ",
        b"Last-Modified: ",
        b"ETag: ",
        b"206",
        b"301",
        b"416",
        b"100",
        b"0000",
        b"Location: ",
        b"//x",
        b"http://127.0.0.1/",
        b"http://other/",
        b"9" * 20,
        b"\xff",
        b"\x00",
        b"Transfer-Encoding: chunked\r\n",
        b"ffffffffffffffff\r\n",
        b"Connection: close\r\n",
    ),
)
