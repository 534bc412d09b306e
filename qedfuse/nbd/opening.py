"""Opening an export of an NBD server as a file of a chain."""

from __future__ import annotations

import errno
import math
import threading
from typing import TYPE_CHECKING

from qedfuse.errors import RemoteError
from qedfuse.nbd.connecting import Tls, make_connection
from qedfuse.nbd.connectionpool import ConnectionPool
from qedfuse.nbd.failures import BrokenError, RefusedError
from qedfuse.nbd.nbdfile import NbdFile

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from qedfuse.nbd.connection import Connection
    from qedfuse.remote.options import Deadlines


def open_nbd(
    connect: Callable[[], socket.socket],
    export_name: str,
    shown_name: str,
    deadlines: Deadlines,
    *,
    path: str | None = None,
    tls: Tls | None = None,
) -> NbdFile:
    """Open an export; the caller must close the file.

    The call blocks until the server answers, or for as long as ``deadlines`` permits.

    Args:
        connect: Function that returns a connected stream socket within a limited time.  Any thread
            may call it again, to replace a broken connection or to add one.  If it raises OSError,
            a read repeats the call until the time of the read is over.  If it raises `QedError`,
            the read fails with this error.
        export_name: The name of the export; empty for the default export of the server.
        shown_name: The name in messages.
        deadlines: How long to wait for the server.
        path: The name of the file as given, such as a URL; None to use ``shown_name``.
        tls: How to use TLS; None to use none.

    Raises:
        RemoteError: The server cannot be reached, or does not serve the export.
        QedError: An error that ``connect`` has raised.
        trio.Cancelled: The call runs in a worker thread of trio, and its task was cancelled.
    """
    size: int | None = None
    closed = threading.Event()

    def make(end: float = math.inf) -> Connection:
        """Make a connection; refuse an export whose size has changed."""
        seconds = deadlines.attempt_seconds
        connection = make_connection(connect, export_name, tls, seconds, closed, end)
        if size is not None and connection.export.size != size:
            connection.close()
            msg = f"found an export of {connection.export.size} bytes, expected {size} as before"
            raise RefusedError(msg, errno.ESTALE)
        return connection

    try:
        first = make()
    except (BrokenError, RefusedError) as error:
        number = error.errno if isinstance(error, RefusedError) else errno.EIO
        msg = f"{shown_name}: {error}"
        raise RemoteError(msg, number) from error
    size = first.export.size
    connections = ConnectionPool(make, first, closed)
    return NbdFile(path or shown_name, shown_name, first.export, connections, deadlines)
