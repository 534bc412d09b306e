"""Reads, writes and fsyncs that the extension answers, or passes to pyfuse3's own operations."""

from __future__ import annotations

import struct
import weakref
from typing import TYPE_CHECKING

import pytest

from qedfuse.mount.fuse import extraops
from tests.support.fusewire import (
    FSYNC,
    FSYNC_SLOT,
    READ,
    READ_SLOT,
    WRITE,
    WRITE_SLOT,
    Operation,
    Wire,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

HANDLE = (1 << 62) + 5
OFFSET = 1 << 45


class Pyfuse3:
    """The operations of pyfuse3, which count their calls and answer nothing.

    Attributes:
        wire: The session.
        calls: The names of the operations that were called, in their order.
    """

    def __init__(self) -> None:
        """Make a session with the three operations."""
        self.calls: list[str] = []
        self._read = Operation(lambda _request, _inode: self.calls.append("read"))
        self._write = Operation(lambda _request, _inode: self.calls.append("write"))
        self._fsync = Operation(lambda _request, _inode: self.calls.append("fsync"))
        self.wire = Wire(
            filled={READ_SLOT: self._read, WRITE_SLOT: self._write, FSYNC_SLOT: self._fsync}
        )

    def read(self, size: int) -> int:
        """Send a read of ``size`` bytes at `OFFSET`; return the number of the request."""
        return self.wire.send(READ, struct.pack("=QQIIQII", HANDLE, OFFSET, size, 0, 0, 0, 0))

    def write(self, data: bytes) -> int:
        """Send a write of ``data`` at `OFFSET`; return the number of the request."""
        head = struct.pack("=QQIIQII", HANDLE, OFFSET, len(data), 0, 0, 0, 0)
        return self.wire.send(WRITE, head + data)

    def fsync(self) -> int:
        """Send an fsync; return the number of the request."""
        return self.wire.send(FSYNC, struct.pack("=QII", HANDLE, 1, 0))


@pytest.fixture
def pyfuse3() -> Iterator[Pyfuse3]:
    """Make a session with operations of pyfuse3, and end it."""
    made = Pyfuse3()
    yield made
    extraops.end()
    made.wire.close()


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
