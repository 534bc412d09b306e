"""Making a connection to an export: the socket, TLS and the handshake, within a limited time."""

from __future__ import annotations

import errno
import math
import select
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.nbd.connection import Connection
from qedfuse.nbd.failures import BrokenError, RefusedError
from qedfuse.nbd.handshake import Receive, Send, handshake
from qedfuse.nbd.waiters import CANCEL_POLL_SECONDS, NO_CONNECTION, check_wanted
from qedfuse.nbd.wire import PlainWire, TlsWire
from qedfuse.remote.client import certificate_message
from qedfuse.text import printable
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from qedfuse.nbd.handshake import Export
    from qedfuse.nbd.wire import Wire


@dataclass(frozen=True, slots=True)
class Tls:
    """How to use TLS.

    Attributes:
        host: The name that the certificate of the server must have.
    """

    host: str


def make_connection(
    connect: Callable[[], socket.socket],
    name: str,
    tls: Tls | None,
    attempt_seconds: float,
    closed: threading.Event,
    end: float = math.inf,
) -> Connection:
    """Connect to an export; the call blocks.

    Args:
        connect: Returns a connected socket, within a limited time.
        name: The name of the export.
        tls: How to use TLS; None to use none.
        attempt_seconds: Maximum time of the handshake, and later of a wait for the next byte.
        closed: Ends the call when it is set.
        end: The time (`time.monotonic`) at which the call ends at the latest.

    Raises:
        BrokenError: The server cannot be reached, does not answer in time, is shutting down, has a
            certificate that is not trusted, or violates the protocol; or ``closed`` was set.
        RefusedError: The server does not serve the export, or this client cannot use it, or no
            certificate can have the name of the host.
        QedError: An error that ``connect`` has raised.
        trio.Cancelled: The calling thread is one of trio, and its task was cancelled.
    """
    try:
        sock = _Connecting(connect).wait(closed, end)
        try:
            # Connecting has its own limit, so the handshake gets all of ``attempt_seconds``.
            deadline = _Deadline(min(end, time.monotonic() + attempt_seconds), closed)
            wire, export = _shake_hands(PlainWire(sock), name, tls, deadline)
        except BaseException:
            sock.close()
            raise
    except ssl.SSLCertVerificationError as error:
        raise BrokenError(certificate_message(error.verify_message)) from error
    except TimeoutError as error:
        raise BrokenError(NO_CONNECTION) from error
    except OSError as error:
        raise BrokenError(error.strerror or str(error)) from error
    return Connection(wire, export, attempt_seconds)


class _Connecting:
    """A thread that calls ``connect``; the thread that waits for the result can give up."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """Start a thread that calls ``connect``."""
        self._connect = connect
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._sock: socket.socket | None = None
        self._failure: BaseException | None = None
        self._is_given_up = False
        start_thread(self._run, name="qedfuse connect")

    def wait(self, closed: threading.Event, end: float) -> socket.socket:
        """Return the socket, or raise the exception of ``connect`` or of `check_wanted`.

        After an exception the socket is closed, even if ``connect`` returns it later.
        """
        try:
            while not self._ended.wait(CANCEL_POLL_SECONDS):
                check_wanted(closed, end)
        except BaseException:
            with self._lock:
                self._is_given_up = True
                sock = self._sock
            if sock is not None:
                sock.close()
            raise
        if self._failure is not None:
            raise self._failure
        assert self._sock is not None  # noqa: S101  `connect` has returned it
        return self._sock

    def _run(self) -> None:
        try:
            sock = self._connect()
        except BaseException as error:  # noqa: BLE001  raised by `wait`
            self._failure = error
        else:
            with self._lock:
                self._sock = sock
                is_given_up = self._is_given_up
            if is_given_up:
                sock.close()
        self._ended.set()


@dataclass(frozen=True, slots=True)
class _Deadline:
    """How long a handshake waits: until the time ``end``, or until ``closed`` is set."""

    end: float
    closed: threading.Event

    def wait(self, wire: Wire) -> None:
        """Wait until bytes can be received."""
        poll = select.poll()
        poll.register(wire.socket, select.POLLIN)
        while (seconds := self.end - time.monotonic()) > 0:
            if poll.poll(1 + 1000 * min(seconds, CANCEL_POLL_SECONDS)):
                return
            check_wanted(self.closed, math.inf)  # the loop itself checks the time
        msg = "found no answer in time during the handshake"
        raise BrokenError(msg)


def _shake_hands(
    wire: Wire, name: str, tls: Tls | None, deadline: _Deadline
) -> tuple[Wire, Export]:
    """Make the handshake; return the wire for all later messages, and the export."""
    steps = handshake(name, use_tls=tls is not None)
    data: bytes | None = None
    while True:
        try:
            step = next(steps) if data is None else steps.send(data)
        except StopIteration as ended:
            export: Export = ended.value
            return wire, export
        data = None
        if isinstance(step, Send):
            wire.send(step.data)
        elif isinstance(step, Receive):
            data = _receive(wire, step.length, deadline)
        else:
            assert tls is not None  # noqa: S101  without TLS there is no StartTls
            tls_wire = _tls_wire(wire.socket, tls.host)
            while not tls_wire.try_handshake():
                deadline.wait(wire)
            wire = tls_wire


def _tls_wire(sock: socket.socket, host: str) -> TlsWire:
    """Return a wire with TLS; the caller must make the handshake of TLS."""
    context = ssl.create_default_context()
    try:
        return TlsWire(sock, context, host)
    except (ValueError, TypeError) as error:  # the host name is not valid
        msg = f"TLS: host name: found '{printable(host)}', expected one that a certificate can have"
        raise RefusedError(msg, errno.EINVAL) from error


def _receive(wire: Wire, length: int, deadline: _Deadline) -> bytes:
    """Receive exactly ``length`` bytes."""
    data = bytearray(length)
    at = 0
    while at < length:
        count = wire.receive_into(memoryview(data)[at:])
        if count is None:
            deadline.wait(wire)
        elif count:
            at += count
        else:
            msg = "found the end of the connection during the handshake"
            raise BrokenError(msg)
    return bytes(data)
