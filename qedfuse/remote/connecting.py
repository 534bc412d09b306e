"""Connecting to a host within one time limit, which covers the name lookup and all addresses.

urllib3's own function does not limit the lookup, and applies the limit to each address separately.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from qedfuse.remote.resolver import RESOLVER, connect_to_any

if TYPE_CHECKING:
    from urllib3.connection import HTTPConnection


def connect(connection: HTTPConnection, host: str) -> socket.socket:
    """Connect to ``host`` within the timeout of ``connection``; return the socket.

    Raises:
        NameResolutionError: The lookup of the host found no address.
        ConnectTimeoutError: A name server or an address did not answer in time.
        NewConnectionError: No address accepts a connection, or no thread can be started for the
            lookup.
    """
    seconds = float(connection.timeout or 0)
    end = time.monotonic() + seconds
    try:
        addresses = RESOLVER.resolve(host, connection.port, seconds)
        sock = connect_to_any(addresses, end)
    except socket.gaierror as error:
        raise NameResolutionError(connection.host, connection, error) from error
    except TimeoutError as error:
        msg = f"found no connection to {connection.host} within {seconds:.1f} seconds"
        # Not with the connection, as urllib3 does: then the text is that of a tuple.
        raise ConnectTimeoutError(msg) from error
    except OSError as error:
        raise NewConnectionError(connection, error.strerror or str(error)) from error
    for level, name, value in connection.socket_options or ():
        with suppress(OSError):
            sock.setsockopt(level, name, value)
    sock.settimeout(max(end - time.monotonic(), 0.001))  # for the handshake of TLS
    return sock
