"""Bursts: the extension takes requests that the kernel already has (``_burst.c``)."""

from __future__ import annotations

import errno
import struct
import sys
from pathlib import Path
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
from tests.support.readsession import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.mount.fuse._extraops import Request

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

READ_BODY = struct.pack("=QQIIQII", 1, 4096, 8, 0, 0, 0, 0)
WRITE_BODY = struct.pack("=QQIIQII", 1, 4096, 4, 0, 0, 0, 0) + b"data"
FSYNC_BODY = struct.pack("=QII", 1, 1, 0)
LSEEK_BODY = struct.pack("=QQII", 1, 0, 3, 0)
HUGE_PAGE = 1 << 21
MAX_REQUESTS = 7
MAX_POLLED_REQUESTS = 63
"""The limits in ``_burst.c``, without polling and while polling is permitted."""


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
    stop_blocking(server.wire)
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


# --- polling --------------------------------------------------------------------------------


def stop_blocking(wire: Wire) -> None:
    """Make reads of the session's device non-blocking, after pyfuse3 has received a request."""
    assert extraops._extension is not None
    wire.queue(READ, READ_BODY)
    assert wire.receive() > 0
    assert extraops._extension.stop_blocking()


class Polled:
    """A server of which bursts may poll, and which is asked whether a call has finished.

    Attributes:
        server: The server.
        asked: How often the extension has asked.
    """

    def __init__(
        self,
        server: Server,
        answer: Callable[[int], bool],
        each_seconds: float = 60.0,
        all_seconds: float = 60.0,
    ) -> None:
        """Permit polling; ``answer`` gets the number of the question, from 1 on.

        Args:
            server: The server.
            answer: Returns whether a call has finished.
            each_seconds: How long the server may poll for each request.
            all_seconds: How long from now the server may poll.
        """
        stop_blocking(server.wire)
        self.server = server
        self.asked = 0
        self._answer = answer
        extraops.permit_polling(each_seconds, all_seconds, self._has_finished)

    def _has_finished(self) -> bool:
        self.asked += 1
        return self._answer(self.asked)


def test_a_request_that_comes_soon_after_an_answer_is_polled_for(server: Server) -> None:
    """While polling is permitted, a burst takes requests that come after the last answer."""

    def answer(number: int) -> bool:
        if number in {3, 4, 9}:
            server.wire.queue(WRITE, WRITE_BODY)
        return number == 12

    polled = Polled(server, answer)
    server.wire.send(READ, READ_BODY)
    assert len(server.wire.answers) == 4
    assert extraops.take_burst_count() == 3
    assert polled.asked == 12


def test_a_finished_call_ends_polling_until_it_is_permitted_again(server: Server) -> None:
    """The event loop gets the next request when a call on a host file has finished."""
    polled = Polled(server, lambda number: number >= 2)
    server.wire.send(READ, READ_BODY)
    assert polled.asked == 2
    server.wire.send(READ, READ_BODY)
    assert polled.asked == 2, "the burst has not polled"
    extraops.permit_polling(60.0, 60.0, polled._has_finished)
    server.wire.send(READ, READ_BODY)
    assert polled.asked == 3


def test_an_error_of_the_function_ends_polling(
    server: Server, recwarn: pytest.WarningsRecorder
) -> None:
    """If the extension cannot learn whether a call has finished, the event loop takes over."""

    def fail(_number: int) -> bool:
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        reported: list[object] = []
        patch.setattr(sys, "unraisablehook", reported.append)
        polled = Polled(server, fail)
        server.wire.send(READ, READ_BODY)
    assert (polled.asked, len(reported), len(recwarn)) == (1, 1, 0)
    assert len(server.wire.answers) == 1


def test_polling_ends_after_its_time(server: Server) -> None:
    """If no request comes, the scheduler gets the time that was polled, and polls no longer."""
    polled = Polled(server, lambda _number: False, each_seconds=1e-4)
    server.wire.send(READ, READ_BODY)
    assert polled.asked
    assert extraops.take_polled_seconds() >= 1e-4
    assert extraops.take_polled_seconds() == 0.0, "the time is reported once"
    late = Polled(server, lambda _number: False, all_seconds=0.0)
    server.wire.send(READ, READ_BODY)
    assert not late.asked, "the time of the permission is over"


def test_polling_in_vain_does_not_count_for_a_later_request(server: Server) -> None:
    """If pyfuse3 receives the request after all, the wait for the next one begins anew."""
    Polled(server, lambda _number: False, each_seconds=1e-4)
    server.wire.send(READ, READ_BODY)
    assert server.wire.receive() == -errno.EINTR, "no request has come"
    server.wire.queue(READ, READ_BODY)
    assert server.wire.receive() > 0
    assert extraops.take_polled_seconds() == 0.0


def test_polling_that_is_forbidden_ends(server: Server) -> None:
    """After polling is forbidden, a burst ends where the kernel has no request."""
    polled = Polled(server, lambda _number: False)
    extraops.forbid_polling()
    server.wire.send(READ, READ_BODY)
    assert (polled.asked, len(server.wire.answers)) == (0, 1)
    assert extraops.take_polled_seconds() == 0.0


def test_the_end_of_the_connection_ends_polling(server: Server) -> None:
    """After the end pyfuse3's loop gets control, and meets the end itself."""

    def answer(number: int) -> bool:
        if number == 2:
            server.wire.abort()
        return number == 50

    polled = Polled(server, answer)
    server.wire.send(READ, READ_BODY)
    assert polled.asked == 2
    assert server.wire.receive() == 0, "libfuse has not ended the session"


def test_a_burst_may_be_longer_while_polling_is_permitted(server: Server) -> None:
    """No other task needs the event loop then, but the number of requests stays limited."""
    Polled(server, lambda _number: False)
    for _ in range(MAX_POLLED_REQUESTS + 2):
        server.wire.queue(WRITE, WRITE_BODY)
    server.wire.send(WRITE, WRITE_BODY)
    assert len(server.wire.answers) == 1 + MAX_POLLED_REQUESTS
    assert server.wire.queued() == 2


def test_a_burst_is_short_again_when_the_time_of_the_permission_is_over(server: Server) -> None:
    """Then the other tasks run after a few requests, because a timer may have made one runnable."""
    Polled(server, lambda _number: False, all_seconds=0.0)
    for _ in range(MAX_REQUESTS + 2):
        server.wire.queue(WRITE, WRITE_BODY)
    server.wire.send(WRITE, WRITE_BODY)
    assert len(server.wire.answers) == 1 + MAX_REQUESTS
    assert server.wire.queued() == 2


def test_a_new_session_does_not_poll_before_it_is_permitted(server: Server) -> None:
    """What was permitted for one session does not hold for the next one."""
    polled = Polled(server, lambda _number: False)
    extraops.end()
    server.wire.close()
    again = Server()
    stop_blocking(again.wire)
    again.wire.send(READ, READ_BODY)
    assert (polled.asked, len(again.wire.answers)) == (0, 1)
    extraops.end()
    again.wire.close()


def may_be_huge(address: int) -> bool:
    """Return whether the kernel may use huge pages for the memory at an address (proc(5))."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *fields = line.split()
        if "-" in name:
            low, high = (int(number, 16) for number in name.split("-"))
            found = low <= address < high
        elif found and name == "VmFlags:":
            return "hg" in fields
    return False


def test_the_requests_of_bursts_are_received_into_a_huge_page() -> None:
    """Each session has memory that is one huge page, if the kernel has such pages."""
    for _ in range(2):
        with session_of(Session()) as made:
            assert extraops._extension is not None
            extraops._extension.set_handler(lambda request, *_: request.offset(9))
            made.wire.queue(LSEEK, LSEEK_BODY)
            made.wire.send(LSEEK, LSEEK_BODY)
            assert len(made.wire.answers) == 2
            assert made.wire.memory % HUGE_PAGE == 0
            if Path("/sys/kernel/mm/transparent_hugepage").exists():
                assert may_be_huge(made.wire.memory)


def test_a_session_does_not_use_the_memory_of_the_last_one() -> None:
    """The memory of a session that was not ended may be too short for the writes of the next."""
    assert extraops._extension is not None
    last = Wire()
    try:
        extraops._extension.set_handler(lambda request, *_: request.offset(9))
        last.queue(LSEEK, LSEEK_BODY)
        last.send(LSEEK, LSEEK_BODY)
        assert last.memory % HUGE_PAGE, "libfuse allocates it, because no init was replaced"
        with session_of(Session()) as made:
            extraops._extension.set_handler(lambda request, *_: request.offset(9))
            made.wire.queue(LSEEK, LSEEK_BODY)
            made.wire.send(LSEEK, LSEEK_BODY)
            assert made.wire.memory % HUGE_PAGE == 0
    finally:
        last.close()
