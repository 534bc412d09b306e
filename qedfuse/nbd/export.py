"""Opening an export of an NBD server by its URL."""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from qedfuse.nbd.connecting import Tls
from qedfuse.nbd.opening import open_nbd
from qedfuse.remote.nbdquery import nbd_parameters
from qedfuse.remote.resolver import RESOLVER, connect_to_any

if TYPE_CHECKING:
    from qedfuse.nbd.nbdfile import NbdFile
    from qedfuse.remote.address import Address
    from qedfuse.remote.options import Deadlines

_PORT: Final = 10809
"""The port of NBD servers if the URL has none."""
_BUSY_POLL_SECONDS: Final = 0.02
"""Interval of the attempts to connect to a Unix socket whose queue of connections is full."""


def open_export(address: Address, deadlines: Deadlines) -> NbdFile:
    """Open an export; the caller must close the file.

    The call blocks until the server answers or the time in ``deadlines`` is over.

    Args:
        address: The address of the export, for which `Address.is_nbd` is True.
        deadlines: How long to wait for the server.

    Raises:
        RemoteError: The server cannot be reached, or does not serve the export.
        trio.Cancelled: The call runs in a worker thread of trio, and its task was cancelled.
    """
    parameters = nbd_parameters(address.query)
    authority = urlsplit(f"//{address.host}")
    host, port = authority.hostname or "", authority.port or _PORT
    path = parameters.get("socket")
    if path is None:
        connect = partial(_connect_tcp, host, port, deadlines.connect_seconds)
    else:
        connect = partial(_connect_unix, path, deadlines.connect_seconds)
    tls = None
    if address.scheme.startswith("nbds"):
        tls = Tls(parameters.get("tls-hostname") or host or "localhost")
    return open_nbd(connect, address.key, address.shown, deadlines, path=address.url, tls=tls)


def _connect_tcp(host: str, port: int, seconds: float) -> socket.socket:
    """Return a socket that is connected to a port of a host, after at most ``seconds``."""
    end = time.monotonic() + seconds
    sock = connect_to_any(RESOLVER.resolve(host, port, seconds), end)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _connect_unix(path: str, seconds: float) -> socket.socket:
    """Return a socket that is connected to the Unix socket ``path``, after at most ``seconds``.

    Raises:
        TimeoutError: The server has not accepted earlier connections in time.
        OSError: The socket cannot be connected.
    """
    end = time.monotonic() + seconds
    sock = socket.socket(socket.AF_UNIX)
    try:
        # A blocking connect(2) would wait for room in the queue without a limit.
        sock.setblocking(False)  # noqa: FBT003  its only parameter
        while True:
            try:
                sock.connect(os.fsencode(path))
            except BlockingIOError as error:  # the queue of the server is full
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError from error
                time.sleep(min(left, _BUSY_POLL_SECONDS))
            else:
                return sock
    except BaseException:
        sock.close()
        raise
