"""Bursts: the extension takes requests that the kernel already has (``_burst.c``)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

import pytest

from qedfuse.mount.fuse import extraops
from tests.support.fusewire import (
    FSYNC,
    FSYNC_SLOT,
    LSEEK,
    READ,
    READ_SLOT,
    WRITE,
    WRITE_SLOT,
    Operation,
    Wire,
    session_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.mount.fuse._extraops import Request

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

READ_BODY = struct.pack("=QQIIQII", 1, 4096, 8, 0, 0, 0, 0)
WRITE_BODY = struct.pack("=QQIIQII", 1, 4096, 4, 0, 0, 0, 0) + b"data"
FSYNC_BODY = struct.pack("=QII", 1, 1, 0)
LSEEK_BODY = struct.pack("=QQII", 1, 0, 3, 0)
MAX_REQUESTS = 7
"""The limit in ``_burst.c``."""


class Server:
    """A session whose requests are answered immediately, unless they are declined.

    Attributes:
        wire: The session.
        declined: The names of the requests that the functions do not answer.
        passed: The names of the requests that pyfuse3 got, in their order.
    """

    def __init__(self) -> None:
        """Make a session and serve its requests."""
        self.declined: set[str] = set()
        self.passed: list[str] = []
        self._kept = [
            Operation(lambda _request, _inode, name=name: self.passed.append(name))
            for name in ("read", "write", "fsync")
        ]
        slots = zip((READ_SLOT, WRITE_SLOT, FSYNC_SLOT), self._kept, strict=True)
        self.wire = Wire(filled=dict(slots))
        assert extraops._extension is not None
        extraops._extension.set_data_handlers(self._read, self._write, self._fsync)
        extraops._extension.set_handler(self._answer)
        extraops.take_burst_count()

    def _read(self, _handle: int, _offset: int, size: int) -> memoryview | None:
        return None if "read" in self.declined else memoryview(bytes(size))

    def _write(self, *_arguments: object) -> bool:
        return "write" not in self.declined

    def _fsync(self, _handle: int) -> bool:
        return "fsync" not in self.declined

    def _answer(self, request: Request, *_arguments: object) -> None:
        request.offset(9)


@pytest.fixture
def server() -> Iterator[Server]:
    """Serve a session, and end it."""
    with session_of(Server()) as made:
        yield made


def test_requests_that_the_kernel_has_follow_without_the_event_loop(server: Server) -> None:
    """After an answer all requests that have arrived are answered in their order, and counted."""
    wire = server.wire
    queued = [
        wire.queue(WRITE, WRITE_BODY),
        wire.queue(FSYNC, FSYNC_BODY),
        wire.queue(LSEEK, LSEEK_BODY),
        wire.queue(READ, READ_BODY),
    ]
    first = wire.send(READ, READ_BODY)
    assert [number for number, _, _ in wire.answers] == [first, *queued]
    assert [error for _, error, _ in wire.answers] == [0] * 5
    assert extraops.take_burst_count() == 4
    assert extraops.take_burst_count() == 0, "each request is counted once"
    assert server.passed == []


@pytest.mark.parametrize("name", ["read", "write", "fsync"])
def test_a_request_for_pyfuse3_ends_the_burst(name: str, server: Server) -> None:
    """After a request that pyfuse3 gets, which may make a coroutine, no other one is taken."""
    wire = server.wire
    server.declined.add(name)
    bodies = {"read": (READ, READ_BODY), "write": (WRITE, WRITE_BODY), "fsync": (FSYNC, FSYNC_BODY)}
    wire.queue(*bodies[name])
    for _ in range(3):
        wire.queue(LSEEK, LSEEK_BODY)
    wire.send(LSEEK, LSEEK_BODY)
    assert server.passed == [name]
    assert len(wire.answers) == 1
    assert wire.queued() == 3
    assert extraops.take_burst_count() == 1


def test_a_request_that_pyfuse3_gets_begins_no_burst(server: Server) -> None:
    """If pyfuse3 gets the request that its loop has taken, no other request is taken."""
    server.declined.add("read")
    server.wire.queue(WRITE, WRITE_BODY)
    server.wire.send(READ, READ_BODY)
    assert (server.passed, server.wire.answers) == (["read"], [])
    assert server.wire.queued() == 1


def test_a_burst_is_limited(server: Server) -> None:
    """A burst takes a limited number of requests, so that the tasks of the event loop can run."""
    for _ in range(MAX_REQUESTS + 2):
        server.wire.queue(WRITE, WRITE_BODY)
    server.wire.send(WRITE, WRITE_BODY)
    assert len(server.wire.answers) == 1 + MAX_REQUESTS
    assert server.wire.queued() == 2


def test_a_request_that_has_vanished_stops_nobody(server: Server) -> None:
    """If no request is there, receiving one does not block, and pyfuse3 repeats."""
    assert extraops._extension is not None
    assert not extraops._extension.stop_blocking(), "pyfuse3 might not repeat"
    server.wire.queue(READ, READ_BODY)
    assert server.wire.receive() == 40 + len(READ_BODY)
    assert extraops._extension.stop_blocking()
    assert server.wire.receive() == -errno.EINTR
    server.wire.send(READ, READ_BODY)
    assert len(server.wire.answers) == 1
    server.wire.queue(READ, READ_BODY)
    server.wire.send(READ, READ_BODY)
    assert len(server.wire.answers) == 3


def test_after_the_end_of_the_session_nothing_is_taken(server: Server) -> None:
    """A session that was ended takes no requests, and a new session takes its own."""
    extraops.end()
    server.wire.queue(READ, READ_BODY)
    server.wire.send(READ, READ_BODY)
    assert server.wire.queued() == 1
    server.wire.close()
    again = Server()
    again.wire.queue(READ, READ_BODY)
    again.wire.send(READ, READ_BODY)
    assert len(again.wire.answers) == 2
    extraops.end()
    again.wire.close()
