"""The extension beside pyfuse3: each request gets exactly one reply.

The requests come from `tests.support.fusewire`, which stands in for the kernel.
"""

from __future__ import annotations

import errno
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.requestcounters import SharedCells
from tests.support.fusewire import (
    FALLOCATE_SLOT,
    LSEEK,
    READ,
    READ_SLOT,
    SLOTS,
    Operation,
    Wire,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.extraops import Handler

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Make a session and end it."""
    wire = Wire()
    yield wire
    extraops.end()
    wire.close()


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the exceptions that C code cannot raise."""
    found: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: found.append(str(what.exc_value)))
    return found


class Keeper:
    """A handler that keeps the requests it gets.

    Attributes:
        requests: The requests, oldest first.
        arguments: The arguments of each, without the request.
    """

    def __init__(self) -> None:
        """Start without requests."""
        self.requests: list[Request] = []
        self.arguments: list[tuple[object, ...]] = []

    def __call__(self, request: Request, *arguments: object) -> None:
        """Keep a request."""
        self.requests.append(request)
        self.arguments.append(arguments)


def served(handler: Handler) -> None:
    """Pass the requests of the session to a handler."""
    assert extraops.serve(handler, None, None, SharedCells(0, ())) is None


def test_a_request_arrives_as_the_kernel_sent_it(wire: Wire) -> None:
    """A request has the operation, user, inode, mode or whence, start and length of the kernel."""
    keeper = Keeper()
    served(keeper)
    wire.fallocate()
    wire.send(LSEEK, struct.pack("=QQII", 1, 1 << 45, 4, 0))
    assert keeper.arguments == [("fallocate", 5, 3, 4096, 8192), ("lseek", 5, 4, 1 << 45, 0)]
    assert wire.answers == []


def test_the_first_answer_counts(wire: Wire) -> None:
    """Only the first reply to a request is sent, and the end of its handle sends none."""
    keeper = Keeper()
    served(keeper)
    first, second = wire.fallocate(), wire.send(LSEEK, struct.pack("=QQII", 1, 0, 3, 0))
    keeper.requests[1].offset(12345)
    keeper.requests[0].error(0)
    for request in keeper.requests:
        request.error(errno.EIO)
        request.offset(1)
    del request
    keeper.requests.clear()
    assert wire.answers == [(second, 0, struct.pack("=q", 12345)), (first, 0, b"")]


def test_a_request_that_is_let_go_answers_itself(wire: Wire) -> None:
    """A request that is garbage-collected, as after a cancellation, replies with EINTR."""
    keeper = Keeper()
    served(keeper)
    number = wire.fallocate()
    assert wire.answers == []
    keeper.requests.clear()
    assert wire.answers == [(number, -errno.EINTR, b"")]


@pytest.mark.parametrize("answer", [lambda request: request.error("x"),
                                    lambda request: request.offset(1 << 64)])  # fmt: skip
def test_an_answer_that_is_none_leaves_the_request_open(
    answer: Callable[[Request], None], wire: Wire
) -> None:
    """A handler that returns None leaves the request open for a later reply."""
    keeper = Keeper()
    served(keeper)
    number = wire.fallocate()
    with pytest.raises((TypeError, OverflowError)):
        answer(keeper.requests[0])
    assert wire.answers == []
    keeper.requests[0].error(errno.ENOSPC)
    assert wire.answers == [(number, -errno.ENOSPC, b"")]


def test_a_handler_that_fails(wire: Wire, complaints: list[str]) -> None:
    """After an exception in the handler the kernel gets EINTR and sys.unraisablehook is called."""

    def fail(*_arguments: object) -> None:
        msg = "no"
        raise ValueError(msg)

    served(fail)
    number = wire.fallocate()
    assert wire.answers == [(number, -errno.EINTR, b"")]
    assert complaints == ["no"]


def test_no_handler(wire: Wire, complaints: list[str]) -> None:
    """Without a handler, before one is set and after it is removed, a request gets EINTR."""
    extraops._extension.set_handler(None)  # type: ignore[union-attr]
    number = wire.fallocate()
    assert wire.answers == [(number, -errno.EINTR, b"")]
    assert complaints == ["no handler is set"]


def test_a_request_outlives_its_session(wire: Wire) -> None:
    """A request that outlives its session does not touch the memory of libfuse."""
    keeper = Keeper()
    served(keeper)
    for _ in range(3):
        wire.fallocate()
    extraops.end()
    keeper.requests.pop().error(0)
    wire.close()
    keeper.requests.pop().error(0)
    keeper.requests.clear()
    assert wire.answers == []


def test_a_request_of_an_earlier_session(wire: Wire) -> None:
    """A request of an earlier session sends no reply in a new session at the same address."""
    keeper = Keeper()
    served(keeper)
    wire.fallocate()
    extraops.end()
    wire.close()
    following = Wire()
    try:
        served(keeper)
        following.fallocate()
        keeper.requests.pop(0).error(0)
        assert following.answers == []
    finally:
        keeper.requests.clear()
        extraops.end()
        following.close()
    assert wire.answers == []
    assert len(following.answers) == 1


@pytest.mark.parametrize("slots", [FALLOCATE_SLOT - 2, SLOTS, SLOTS + 20])
def test_tables_of_any_size(slots: int) -> None:
    """The extension accepts operation tables of an older and of a newer libfuse."""
    calls: list[int] = []
    reader = Operation(lambda _request, inode: calls.append(inode))
    wire = Wire(slots, {READ_SLOT: reader})
    keeper = Keeper()
    served(keeper)
    try:
        wire.fallocate()
        wire.send(READ, bytes(40))
    finally:
        keeper.requests.clear()
        extraops.end()
        wire.close()
    assert calls == [5]
    assert keeper.arguments == [("fallocate", 5, 3, 4096, 8192)]


def test_handlers_of_pyfuse3_come_first() -> None:
    """A pyfuse3 that implements fallocate gets its requests itself."""
    calls: list[int] = []
    own = Operation(lambda _request, inode: calls.append(inode))
    wire = Wire(filled={FALLOCATE_SLOT: own})
    keeper = Keeper()
    served(keeper)
    try:
        wire.fallocate()
    finally:
        extraops.end()
        wire.close()
    assert (calls, keeper.arguments) == ([5], [])
