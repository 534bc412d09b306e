"""Sending and receiving the bytes of a connection, with or without TLS, without blocking.

A wire is not safe for concurrent use; `qedfuse.nbd.connection.Connection` has the lock.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import socket

_RECEIVE_BYTES = 256 << 10


class Wire(Protocol):
    """A connection as a stream of bytes; the methods raise OSError if it is broken.

    Attributes:
        socket: The socket, on which callers wait until bytes can be received.
    """

    socket: socket.socket

    def send(self, data: bytes) -> None:
        """Send ``data`` without blocking.

        Bytes that the socket does not accept yet are sent by later calls of `send` or
        `receive_into`.
        """

    def receive_into(self, view: memoryview) -> int | None:
        """Receive bytes into ``view``; return their number.

        Returns None if no byte has come, and 0 at the end of the stream.
        """


class PlainWire:
    """A connection without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        """Use a connected socket, which is made non-blocking."""
        sock.setblocking(False)  # noqa: FBT003  no keyword
        self.socket = sock
        self._unsent = bytearray()

    def send(self, data: bytes) -> None:
        """Send ``data``; see `Wire`."""
        if self._unsent:
            self._unsent += data
            self._flush()
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._unsent += data[sent:]

    def receive_into(self, view: memoryview) -> int | None:
        """Receive bytes; see `Wire`."""
        if self._unsent:
            self._flush()
        try:
            return self.socket.recv_into(view)
        except BlockingIOError:
            return None

    def _flush(self) -> None:
        try:
            sent = self.socket.send(self._unsent)
        except BlockingIOError:
            return
        del self._unsent[:sent]


class TlsWire:
    """A connection with TLS.

    The caller must first call `try_handshake` until it returns True.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str | None) -> None:
        """Use a connected socket; ``host`` is the name that the certificate must have."""
        self._plain = PlainWire(sock)
        self.socket = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._received = memoryview(bytearray(_RECEIVE_BYTES))

    def try_handshake(self) -> bool:
        """Continue the handshake of TLS without blocking; return whether the handshake has ended.

        Raises:
            OSError: The handshake failed, or the connection is broken.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_outgoing()
                if not self._receive_more():
                    return False
            else:
                self._send_outgoing()
                return True

    def send(self, data: bytes) -> None:
        """Send ``data``; see `Wire`."""
        self._tls.write(data)
        self._send_outgoing()

    def receive_into(self, view: memoryview) -> int | None:
        """Receive bytes; see `Wire`."""
        while True:
            try:
                # If the stream ends without a close_notify alert, the call raises an SSLError.
                return cast("int", self._tls.read(len(view), view))
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLWantReadError:
                self._send_outgoing()
                if not self._receive_more():
                    return None

    def _send_outgoing(self) -> None:
        if self._outgoing.pending:
            self._plain.send(self._outgoing.read())

    def _receive_more(self) -> bool:
        """Receive encrypted bytes, or the end of the stream; return False if neither has come."""
        count = self._plain.receive_into(self._received)
        if count is None:
            return False
        if count:
            self._incoming.write(self._received[:count])
        else:
            self._incoming.write_eof()
        return True
