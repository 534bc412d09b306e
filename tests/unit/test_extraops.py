"""The extension beside pyfuse3: each request gets exactly one reply.

libfuse itself is here, but no kernel: a session is made in the way pyfuse3 makes it, the requests
of the kernel are made up, and the replies of libfuse are collected.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.mount.fuse import extraops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.extraops import Handler

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

INIT: Final = 26
FALLOCATE: Final = 43
LSEEK: Final = 46
READ_SLOT: Final = 15
FALLOCATE_SLOT: Final = 40
SLOTS: Final = 44
"""The operations of libfuse 3.14; the indices of older ones never change."""

Writer = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)
Operation = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)


class Arguments(ctypes.Structure):
    """struct fuse_args."""

    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.POINTER(ctypes.c_char_p)),
        ("allocated", ctypes.c_int),
    )


class Buffer(ctypes.Structure):
    """struct fuse_buf, with padding for fields that later versions add."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("mem", ctypes.c_char_p),
        ("fd", ctypes.c_int),
        ("pos", ctypes.c_longlong),
        ("padding", ctypes.c_char * 32),
    )


class Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class InOut(ctypes.Structure):
    """struct fuse_custom_io."""

    _fields_ = (("writev", Writer), ("read", Writer), ("others", ctypes.c_void_p * 2))


class Wire:
    """A session of libfuse, with a test in place of the kernel.

    Attributes:
        answers: The replies of libfuse: number of the request, error, payload.
    """

    def __init__(self, slots: int = SLOTS, filled: dict[int, object] | None = None) -> None:
        """Make a session with a table of ``slots`` operations, all NULL except ``filled``."""
        assert extraops._extension is not None
        self.answers: list[tuple[int, int, bytes]] = []
        library = ctypes.CDLL(extraops._extension.__file__)
        if not hasattr(library, "fuse_session_custom_io"):
            pytest.skip("this libfuse talks to the kernel only")
        library.fuse_session_new.restype = ctypes.c_void_p
        table = (ctypes.c_void_p * slots)()
        for slot, function in (filled or {}).items():
            table[slot] = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]
        names = (ctypes.c_char_p * 2)(b"test", None)
        arguments = Arguments(1, names, 0)
        made = library.fuse_session_new(
            ctypes.byref(arguments), table, ctypes.c_size_t(ctypes.sizeof(table)), None
        )
        assert made is not None
        self._session = ctypes.c_void_p(made)
        self._open = True
        self._library = library
        self._writer = Writer(self._collect)
        io = InOut(self._writer, self._writer)
        library.fuse_pkgversion.restype = ctypes.c_char_p
        version = [int(part) for part in library.fuse_pkgversion().split(b".")[:2]]
        size = [ctypes.c_size_t(ctypes.sizeof(io))] if version >= [3, 17] else []
        # The descriptor is not used; libfuse closes it at the end.
        unused = os.open(os.devnull, os.O_RDWR)
        done = library.fuse_session_custom_io(self._session, ctypes.byref(io), *size, unused)
        assert done == 0
        self._number = 0
        self.send(INIT, struct.pack("=IIII", 7, 38, 65536, 0))
        self.answers.clear()

    def _collect(self, _fd: int, vectors: int, count: int, _data: object) -> int:
        """Collect a reply that libfuse writes to the kernel."""
        parts = (Vector * count).from_address(vectors)
        said = b"".join(ctypes.string_at(part.base, part.length) for part in parts)
        _length, error, number = struct.unpack_from("=IiQ", said)
        self.answers.append((number, error, said[16:]))
        return len(said)

    def send(self, operation: int, body: bytes) -> int:
        """Pass a request of user 7 on inode 5 to libfuse; return its number."""
        self._number += 1
        length = 40 + len(body)
        said = struct.pack("=IIQQIIII", length, operation, self._number, 5, 7, 8, 9, 0) + body
        self._library.fuse_session_process_buf(
            self._session, ctypes.byref(Buffer(length, 0, said, -1, 0))
        )
        return self._number

    def fallocate(self) -> int:
        """Send a request to punch a hole of 8192 bytes at 4096."""
        return self.send(FALLOCATE, struct.pack("=QQQII", 1, 4096, 8192, 3, 0))

    def close(self) -> None:
        """End the session, as pyfuse3 does after the extension was detached."""
        if self._open:
            self._library.fuse_session_destroy(self._session)
            self._open = False


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
    assert extraops.serve(handler) is None


def test_a_request_arrives_as_the_kernel_sent_it(wire: Wire) -> None:
    """A request has the operation, user, inode, mode or whence, start and length of the kernel."""
    keeper = Keeper()
    served(keeper)
    wire.fallocate()
    wire.send(LSEEK, struct.pack("=QQII", 1, 1 << 45, 4, 0))
    assert keeper.arguments == [("fallocate", 7, 5, 3, 4096, 8192), ("lseek", 7, 5, 4, 1 << 45, 0)]
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
        wire.send(15, bytes(40))
    finally:
        keeper.requests.clear()
        extraops.end()
        wire.close()
    assert calls == [5]
    assert keeper.arguments == [("fallocate", 7, 5, 3, 4096, 8192)]


def test_handlers_of_pyfuse3_come_first() -> None:
    """The extension does not replace operations that pyfuse3 has set."""
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
