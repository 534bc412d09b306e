"""Requests of the kernel as the C extension beside pyfuse3 reads them: each is answered once.

An input is a sequence of requests, each followed by what the handlers do with it: return data of
any length, return something else, raise, defer, or leave the request to pyfuse3.  The kernel and
libfuse are trusted to pass whole structures, so only the values in them are drawn.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.requestcounters import SharedCells
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target
from tests.support.fusewire import (
    FALLOCATE,
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
    from qedfuse.mount.fuse._extraops import Request

_MAX_REQUESTS: Final = 40
_FILE_BYTES: Final = 10_000
_MAX_ERRNO: Final = 1000
"""libfuse prints a line for a greater number."""


class _HandlerError(Exception):
    """A handler fails on purpose."""


class _Session:
    """A session whose handlers do what an input says.

    Attributes:
        wire: The session of libfuse.
        passed: How many requests pyfuse3 got.
    """

    def __init__(self, drawn: Drawn, fd: int) -> None:
        """Draw what the handlers do from ``drawn``; ``fd`` is a file from which reads are sent."""
        self._drawn = drawn
        self._fd = fd
        self._kept: list[Request] = []
        self.passed = 0
        self._operation = Operation(self._pass)
        slots = (READ_SLOT, WRITE_SLOT, FSYNC_SLOT)
        self.wire = Wire(filled=dict.fromkeys(slots, self._operation))
        extraops.serve(self._handle, None, None, SharedCells(0, ()))
        assert extraops._extension is not None
        extraops._extension.set_data_handlers(self._read, self._write, self._fsync)

    def _pass(self, _request: object, _inode: object) -> None:
        """Count a request that pyfuse3 gets, and would answer."""
        self.passed += 1

    def _use(self, request: Request) -> None:
        """Answer a request in one of the ways, more than once, or keep it."""
        for _ in range(1 + self._drawn.number() % 3):
            way = self._drawn.number() % 5
            with suppress(OverflowError, TypeError, ValueError):
                if way == 0:
                    request.error(self._drawn.number(2) % _MAX_ERRNO)
                elif way == 1:
                    request.offset(self._drawn.number(8))
                elif way == 2:
                    request.data(bytes(self._drawn.number(2)))
                elif way == 3:
                    self._kept.append(request)
                else:
                    self._kept.clear()

    def _handle(self, request: Request, *_arguments: object) -> None:
        """Handle fallocate and lseek."""
        self._use(request)
        if self._drawn.number() % 4 == 0:
            raise _HandlerError

    def _read(self, _handle: int, _offset: int, size: int) -> memoryview | None:
        """Handle a read."""
        way = self._drawn.number() % 7
        if way == 0:
            return memoryview(bytes(size))
        if way == 1:
            return memoryview(bytes(self._drawn.number(2)))
        if way == 2:
            return "no buffer"  # type: ignore[return-value]  # the extension must survive it
        if way == 3:
            raise _HandlerError
        if way == 4:
            self._use(extraops.defer_read())
        if way == 5:
            with suppress(OverflowError):
                extraops.reply_from_file(self._fd, self._drawn.number(8) - (1 << 10))
        if way == 6:
            with suppress(RuntimeError):
                extraops.defer_read()
                extraops.defer_read()
        return None

    def _write(self, _handle: int, _offset: int, data: memoryview) -> bool:
        """Handle a write."""
        way = self._drawn.number() % 4
        if way == 3:
            raise _HandlerError
        assert len(bytes(data)) == len(data)
        return (True, False, None)[way]  # type: ignore[return-value]  # the same

    def _fsync(self, _handle: int) -> bool:
        """Handle an fsync."""
        way = self._drawn.number() % 3
        if way == 2:
            raise _HandlerError
        return bool(way)

    def send(self) -> None:
        """Send a request that is drawn."""
        drawn = self._drawn
        kind = drawn.choice((READ, WRITE, FSYNC, FALLOCATE, LSEEK))
        handle, offset = drawn.number(8), drawn.number(8)
        if kind == READ:
            size = drawn.number(4) % (1 << 21)
            body = struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0)
        elif kind == WRITE:
            data = bytes(drawn.number(2))
            body = struct.pack("=QQIIQII", handle, offset, len(data), 0, 0, 0, 0) + data
        elif kind == FSYNC:
            body = struct.pack("=QII", handle, drawn.number(), 0)
        elif kind == FALLOCATE:
            body = struct.pack("=QQQII", handle, offset, drawn.number(8), drawn.number(4), 0)
        else:
            body = struct.pack("=QQII", handle, offset, drawn.number(4), 0)
        self.wire.send(kind, body)

    def drop_kept(self) -> None:
        """Free the requests that were kept, which answers those that have no answer."""
        self._kept.clear()


def check(data: bytes) -> None:
    """Send the requests of an input."""
    if extraops._extension is None:
        return
    path = put(scratch("fuserequests") / "file", b"f" * _FILE_BYTES)
    drawn, count = Drawn(data), 0
    fd = os.open(path, os.O_RDONLY)
    # Only the types: a traceback would keep the request, which is answered when it is freed.
    failures: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda what: failures.append(what.exc_type)
    try:
        with session_of(_Session(drawn, fd)) as session:
            while drawn and count < _MAX_REQUESTS:
                session.send()
                count += 1
            session.drop_kept()
            numbers = [number for number, _, _ in session.wire.answers]
            assert len(set(numbers)) == len(numbers), "a request was answered twice"
            assert len(numbers) + session.passed == count, "a request was not answered"
            assert set(failures) <= {_HandlerError}, failures
    finally:
        sys.unraisablehook = hook
        os.close(fd)


def seeds() -> list[bytes]:
    """Return one request of each kind, with each way to answer it."""
    head = bytes(16)
    reads = [b"\0" + head + b"\0\4\0\0" + bytes((way, 0, 2, 1, 0, 0)) for way in range(7)]
    writes = [b"\1" + head + b"\0\2" + bytes((way,)) for way in range(4)]
    fsyncs = [b"\2" + head + b"\1" + bytes((way,)) for way in range(3)]
    others = [
        kind + head + rest + bytes((0, way, 1, 2, 3, 4, 5, 6, 7, 8, 1))
        for kind, rest in ((b"\3", bytes(12)), (b"\4", b"\3\0\0\0"))
        for way in range(5)
    ]
    each = [*reads, *writes, *fsyncs, *others]
    return [*each, b"".join(each)]


TARGET: Final = Target(check, seeds, max_bytes=1200, uses_c=True)
