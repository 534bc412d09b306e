"""A session of libfuse without a kernel, for tests of the extension beside pyfuse3.

A session is made in the way pyfuse3 makes it, the requests of the kernel are made up, and the
replies of libfuse are collected.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import pytest

from qedfuse.mount.fuse import extraops

if TYPE_CHECKING:
    from collections.abc import Iterator

READ: Final = 15
WRITE: Final = 16
FSYNC: Final = 20
INIT: Final = 26
FALLOCATE: Final = 43
LSEEK: Final = 46
"""Numbers of the requests, from linux/fuse.h."""
INIT_SLOT: Final = 0
READ_SLOT: Final = 15
WRITE_SLOT: Final = 16
NODE = 5
"""The inode number of all requests."""
FSYNC_SLOT: Final = 19
FALLOCATE_SLOT: Final = 40
SLOTS: Final = 44
"""The operations of libfuse 3.14; the indices of older ones never change."""

Writer = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)
Reader = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    use_errno=True,
)
Splicer = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p),
    *(ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p),
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

    _fields_ = (
        *(("writev", Writer), ("read", Reader)),
        *(("splice_receive", ctypes.c_void_p), ("splice_send", Splicer)),
    )


class Wire:
    """A session of libfuse, with a test in place of the kernel.

    Attributes:
        answers: The replies of libfuse: number of the request, error, payload.
        spliced: How many replies came through a pipe.
        memory: Address of the memory for the last request of `queue` that was taken.
    """

    def __init__(
        self,
        slots: int = SLOTS,
        filled: dict[int, object] | None = None,
        *,
        can_splice: bool = False,
    ) -> None:
        """Make a session with a table of ``slots`` operations, all NULL except ``filled``.

        If it ``can_splice``, the kernel takes replies from a pipe, too.
        """
        assert extraops._extension is not None
        self.answers: list[tuple[int, int, bytes]] = []
        self.spliced = 0
        self.memory = 0
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
        self._reader = Reader(self._receive)
        self._splicer = Splicer(self._collect_pipe if can_splice else 0)
        io = InOut(self._writer, self._reader, None, self._splicer)
        library.fuse_pkgversion.restype = ctypes.c_char_p
        version = [int(part) for part in library.fuse_pkgversion().split(b".")[:2]]
        size = [ctypes.c_size_t(ctypes.sizeof(io))] if version >= [3, 17] else []
        # Each packet in this socket is a request that the kernel has.  libfuse closes the end
        # that it gets.
        self._queue, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        done = library.fuse_session_custom_io(
            *(self._session, ctypes.byref(io), *size, device.detach())
        )
        assert done == 0
        self._number = 0
        self.send(INIT, struct.pack("=IIII", 7, 38, 65536, 0))
        self.answers.clear()

    def _collect(self, _fd: int, vectors: int, count: int, _data: object) -> int:
        """Collect a reply that libfuse writes to the kernel."""
        parts = (Vector * count).from_address(vectors)
        self._record(b"".join(ctypes.string_at(part.base, part.length) for part in parts))
        return sum(part.length for part in parts)

    def _collect_pipe(
        self, pipe: int, _in: object, _fd: int, _out: object, size: int, _flags: int, _data: object
    ) -> int:
        """Collect a reply that libfuse splices to the kernel."""
        self.spliced += 1
        said = os.read(pipe, size)
        self._record(said)
        return len(said)

    def _record(self, said: bytes) -> None:
        """Record a reply."""
        _length, error, number = struct.unpack_from("=IiQ", said)
        self.answers.append((number, error, said[16:]))

    def _receive(self, fd: int, buffer: int, size: int, _data: object) -> int:
        """Take a request that `queue` has put into the socket."""
        try:
            said = os.read(fd, size)
        except BlockingIOError as error:
            ctypes.set_errno(error.errno or 0)
            return -1
        if not said:  # after `abort`
            ctypes.set_errno(errno.ENODEV)
            return -1
        ctypes.memmove(buffer, said, len(said))
        self.memory = buffer
        return len(said)

    def _request(self, operation: int, body: bytes) -> bytes:
        """Return a request of user 7 on inode 5, with a new number."""
        self._number += 1
        length = 40 + len(body)
        return struct.pack("=IIQQIIII", length, operation, self._number, NODE, 7, 8, 9, 0) + body

    def send(self, operation: int, body: bytes) -> int:
        """Pass a request to libfuse, as the event loop does; return its number."""
        said = self._request(operation, body)
        self._library.fuse_session_process_buf(
            self._session, ctypes.byref(Buffer(len(said), 0, said, -1, 0))
        )
        return self._number

    def queue(self, operation: int, body: bytes) -> int:
        """Let the kernel have a request that no task has taken yet; return its number."""
        self._queue.send(self._request(operation, body))
        return self._number

    def receive(self) -> int:
        """Receive a request as pyfuse3 does; return its length, or a negative errno."""
        buffer = Buffer(0, 0, None, -1, 0)
        result: int = self._library.fuse_session_receive_buf(self._session, ctypes.byref(buffer))
        return result

    def abort(self) -> None:
        """End the connection, as the kernel does for an unmounted file system."""
        self._queue.close()

    def queued(self) -> int:
        """Return how many requests of `queue` were not taken, and forget them."""
        count = 0
        with socket.socket(fileno=os.dup(self._library.fuse_session_fd(self._session))) as device:
            device.settimeout(0)
            with suppress(BlockingIOError):
                while device.recv(1 << 16):
                    count += 1
        return count

    def fallocate(self) -> int:
        """Send a request to punch a hole of 8192 bytes at 4096."""
        return self.send(FALLOCATE, struct.pack("=QQQII", 1, 4096, 8192, 3, 0))

    def close(self) -> None:
        """End the session, as pyfuse3 does after the extension was detached."""
        if self._open:
            self._library.fuse_session_destroy(self._session)
            self._queue.close()
            self._open = False


class Served(Protocol):
    """An object with handlers of a test, which serves the session ``wire``."""

    wire: Wire


S = TypeVar("S", bound=Served)


@contextmanager
def session_of(served: S) -> Iterator[S]:
    """Give ``served`` for the block; then detach the extension and end the session."""
    yield served
    extraops.end()
    served.wire.close()
