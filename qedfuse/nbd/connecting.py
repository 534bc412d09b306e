"""Making a connection to an export: the socket, TLS and the handshake, within a limited time."""

from __future__ import annotations

import select
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.nbd.connection import Connection
from qedfuse.nbd.failures import BrokenError
from qedfuse.nbd.handshake import Receive, Send, handshake
from qedfuse.nbd.waiters import CANCEL_POLL_SECONDS, check_cancelled
from qedfuse.nbd.wire import PlainWire, TlsWire

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
    connect: Callable[[], socket.socket], name: str, tls: Tls | None, attempt_seconds: float
) -> Connection:
    """Connect to an export; the call blocks.

    Args:
        connect: Returns a connected socket, within a limited time.
        name: The name of the export.
        tls: How to use TLS; None to use none.
        attempt_seconds: Maximum time of the handshake, and after the handshake the maximum time for
            which a server sends nothing although a reply is expected.

    Raises:
        BrokenError: The server cannot be reached, or does not keep to the protocol.
        RefusedError: The server does not serve the export in a way that can be used.
    """
    end = time.monotonic() + attempt_seconds
    try:
        sock = connect()
        try:
            wire, export = _shake_hands(PlainWire(sock), name, tls, end)
        except BaseException:
            sock.close()
            raise
    except ssl.SSLCertVerificationError as error:
        msg = (
            f"TLS: certificate: found {error.verify_message}, expected one that is trusted "
            "(SSL_CERT_FILE names a file with others)"
        )
        raise BrokenError(msg) from error
    except TimeoutError as error:
        msg = "found no connection in time"
        raise BrokenError(msg) from error
    except OSError as error:
        raise BrokenError(error.strerror or str(error)) from error
    return Connection(wire, export, attempt_seconds)


def _shake_hands(wire: Wire, name: str, tls: Tls | None, end: float) -> tuple[Wire, Export]:
    """Make the handshake; return the wire to use after it, which may have TLS, and the export."""
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
            data = _receive(wire, step.length, end)
        else:
            assert tls is not None  # noqa: S101  otherwise there is no such step
            tls_wire = TlsWire(wire.socket, ssl.create_default_context(), tls.host)
            while not tls_wire.try_handshake():
                _wait(wire, end)
            wire = tls_wire


def _receive(wire: Wire, length: int, end: float) -> bytes:
    """Receive exactly ``length`` bytes, at the latest at the time ``end``."""
    data = bytearray(length)
    at = 0
    while at < length:
        count = wire.receive_into(memoryview(data)[at:])
        if count is None:
            _wait(wire, end)
        elif count:
            at += count
        else:
            msg = "found the end of the connection during the handshake"
            raise BrokenError(msg)
    return bytes(data)


def _wait(wire: Wire, end: float) -> None:
    """Wait until bytes can be received.

    Raises:
        BrokenError: No byte has come until the time ``end``.
        trio.Cancelled: This is a thread of trio, and its task was cancelled.
    """
    poll = select.poll()
    poll.register(wire.socket, select.POLLIN)
    while (seconds := end - time.monotonic()) > 0:
        if poll.poll(1 + 1000 * min(seconds, CANCEL_POLL_SECONDS)):
            return
        check_cancelled()
    msg = "found no answer in time during the handshake"
    raise BrokenError(msg)
