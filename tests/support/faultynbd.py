"""An NBD server of the tests' own that makes the mistakes that a test asks for."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.nbd import messages
from tests.support.nbdservers import connect_unix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DRIP_SECONDS: Final = 0.05
_BACKLOG: Final = 64
_DATA_AT: Final = messages.STRUCTURED_REPLY.size + messages.DATA_OFFSET.size

REPLY_FAULTS: Final = (
    *("reset", "cut", "cut in the header", "stall", "drip", "another cookie", "magic", "too short"),
    *("outside", "error", "shutdown", "twice", "no offset"),
)
"""What can be wrong with the reply to a read; ``late`` and ``held`` are no mistakes."""
CONNECTION_FAULTS: Final = (
    *("refuse", "no greeting", "stall in the handshake", "garbage", "other size", "no export"),
)


class FaultyServer:
    """A server of one export, whose mistakes a function chooses.

    Attributes:
        content: The export; a fault ``other size`` adds a block.
        choose_reply: Returns the fault for the reply to a read, or None; called with its number.
        choose_connection: Returns the fault for a connection, or None; called with its number.
        choose_extents: Returns (length, flags) of the extents from an offset on, or the number of
            an error; called with the offset and the length of a request.
        struck: How often each fault was made.
        connect: Connects to the server.
        released: Set when the replies with the fault ``held`` may go on; it is not a mistake.
    """

    def __init__(self, path: Path, content: bytes, *, backlog: int = _BACKLOG) -> None:
        """Listen on a socket ``path``; `start` accepts connections, and makes no mistakes yet.

        Args:
            path: The path of the socket.
            content: The export.
            backlog: The length of the queue of connections, as for listen(2).
        """
        self.content = content
        self.choose_reply: Callable[[int], str | None] = _none
        self.choose_connection: Callable[[int], str | None] = _none
        self.choose_extents: Callable[[int, int], list[tuple[int, int]] | int] = _all_data
        self.struck: Counter[str] = Counter()
        self.connect = partial(connect_unix, path)
        self.released = threading.Event()
        self._flags = messages.FLAG_HAS_FLAGS | messages.FLAG_CAN_MULTI_CONN
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(backlog)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._stopped = threading.Event()
        self._reads = self._connections = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Accept connections from now on."""
        self._threads.append(threading.Thread(target=self._accept, daemon=True))
        self._threads[0].start()

    def break_connections(self) -> None:
        """Close all connections, as a restart of the server does."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """End the server."""
        self._stopped.set()
        self.released.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_connections()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._sockets.append(sock)
                self._connections += 1
                number = self._connections
            thread = threading.Thread(target=self._serve, args=(sock, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        """Serve one connection."""
        with sock, suppress(OSError, EOFError):
            fault = self.choose_connection(number)
            if fault is not None:
                self.struck[fault] += 1
            if fault == "refuse":
                return
            if fault == "no greeting":
                self._stopped.wait()
                return
            if fault == "garbage":
                sock.sendall(bytes(range(256)) * 16)
                return
            self._shake_hands(sock, fault)
            self._answer(sock)

    def _shake_hands(self, sock: socket.socket, fault: str | None) -> None:
        sock.sendall(messages.INIT_MAGIC + messages.OPTION_MAGIC + b"\0\3")
        _receive(sock, 4)
        if fault == "stall in the handshake":
            self._stopped.wait()
            raise EOFError
        option = 0
        while option != messages.OPT_GO:
            _, option, length = messages.OPTION.unpack(_receive(sock, messages.OPTION.size))
            _receive(sock, length)
            if option == messages.OPT_GO:
                if fault == "no export":
                    _reply(sock, option, messages.REP_ERR_UNKNOWN)
                    raise EOFError
                size = len(self.content) + (4096 if fault == "other size" else 0)
                export = messages.EXPORT_INFO.pack(messages.INFO_EXPORT, size, self._flags)
                _reply(sock, option, messages.REP_INFO, export)
            elif option == messages.OPT_SET_META_CONTEXT:
                _reply(sock, option, messages.REP_META_CONTEXT, bytes(4) + messages.ALLOCATION)
            _reply(sock, option, messages.REP_ACK)

    def _answer(self, sock: socket.socket) -> None:
        """Answer requests until the client disconnects."""
        late: list[bytes] = []
        while True:
            _, _, command, cookie, offset, length = messages.REQUEST.unpack(
                _receive(sock, messages.REQUEST.size)
            )
            if command == messages.CMD_DISC:
                return
            if command == messages.CMD_BLOCK_STATUS:
                extents = self.choose_extents(offset, length)
                if isinstance(extents, int):
                    error = messages.ERROR.pack(extents, 0)
                    sock.sendall(_chunk(cookie, messages.REPLY_IS_ERROR + 1, error))
                    continue
                payload = bytes(4) + b"".join(messages.EXTENT.pack(*each) for each in extents)
                sock.sendall(_chunk(cookie, messages.REPLY_BLOCK_STATUS, payload))
                continue
            with self._lock:
                self._reads += 1
                fault = self.choose_reply(self._reads)
                if fault is not None:
                    self.struck[fault] += 1
            if fault == "held":
                self.released.wait()
                fault = None
            if fault == "late":
                late.append(self._good(cookie, offset, length))
                continue
            self._reply_with(sock, fault, cookie, offset, length)
            for reply in late:
                sock.sendall(reply)
            late.clear()

    def _good(self, cookie: int, offset: int, length: int) -> bytes:
        """Return the right reply."""
        data = messages.DATA_OFFSET.pack(offset) + self.content[offset : offset + length]
        return _chunk(cookie, messages.REPLY_OFFSET_DATA, data)

    def _reply_with(
        self, sock: socket.socket, fault: str | None, cookie: int, offset: int, length: int
    ) -> None:
        """Reply to a read, perhaps in a wrong way."""
        good = self._good(cookie, offset, length)
        if fault == "drip":
            for at in range(len(good)):
                sock.sendall(good[at : at + 1])
                if self._stopped.wait(DRIP_SECONDS):
                    raise EOFError
            return
        data = good[_DATA_AT:]
        start = messages.DATA_OFFSET.pack(offset)
        kind = messages.REPLY_OFFSET_DATA
        error = messages.REPLY_IS_ERROR + 1
        wrong = {
            "reset": b"",
            "cut": good[: len(good) // 2],
            "cut in the header": good[:9],
            "stall": good[: len(good) // 2],
            "another cookie": self._good(cookie + 1000, offset, length),
            "magic": bytes(len(good)),
            "too short": _chunk(cookie, kind, start + data[:-1]),
            "no offset": _chunk(cookie, kind, b"")[:-1] + b"\5" + start + data,
            "outside": _chunk(cookie, kind, messages.DATA_OFFSET.pack(offset + 1) + data),
            "twice": _chunk(cookie, kind, start + data, flags=0) + good,
            "error": _chunk(cookie, error, messages.ERROR.pack(5, 0)),
            "shutdown": _chunk(cookie, error, messages.ERROR.pack(108, 0)),
        }
        sock.sendall(good if fault is None else wrong[fault])
        if fault == "stall":
            self._stopped.wait()
        if fault in {"reset", "cut", "cut in the header", "stall"}:
            raise EOFError


@contextmanager
def serving_faulty(directory: Path, content: bytes) -> Iterator[FaultyServer]:
    """Run a server for the block, on a socket in a directory."""
    server = FaultyServer(directory / "faulty", content)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def serving_nothing(directory: Path) -> Iterator[FaultyServer]:
    """Listen for the block on a socket whose queue of connections is full, until `start`."""
    path = directory / "faulty"
    server = FaultyServer(path, bytes(range(256)) * 32, backlog=0)
    with ExitStack() as stack:
        stack.callback(server.stop)
        stack.enter_context(server.connect())  # Linux queues one connection more than the backlog
        refused = stack.enter_context(socket.socket(socket.AF_UNIX))
        refused.settimeout(0)
        with pytest.raises(BlockingIOError):
            refused.connect(str(path))
        yield server


def _none(_number: int) -> str | None:
    return None


def _all_data(_offset: int, length: int) -> list[tuple[int, int]]:
    return [(length, 0)]


def _receive(sock: socket.socket, length: int) -> bytes:
    """Receive exactly ``length`` bytes, or raise EOFError."""
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _reply(sock: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    """Reply to an option."""
    head = messages.OPTION_REPLY.pack(messages.OPTION_REPLY_MAGIC, option, kind, len(data))
    sock.sendall(head + data)


def _chunk(cookie: int, kind: int, payload: bytes, *, flags: int = 1) -> bytes:
    """Return a chunk of a reply."""
    head = messages.STRUCTURED_REPLY.pack(
        messages.STRUCTURED_MAGIC, flags, kind, cookie, len(payload)
    )
    return head + payload
