"""Connections of urllib3 with one time limit to connect, and one for a whole response.

The timeout of a socket applies to each read separately.  With that alone, a server that sends one
byte before each timeout could block a thread without limit.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import urllib3
import urllib3.util
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from qedfuse.remote.connecting import connect
from qedfuse.remote.tlssocket import tls_context
from qedfuse.util.timeval import timeval

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LONG_READ_BYTES: Final = 1 << 16
"""Minimum length of a read that fills its buffer with one system call (without TLS)."""
_SKIPPED_STATUS: Final = range(102, 200)
"""Statuses of informational responses, except 100, which the base class skips."""
_BUFFER_BYTES: Final = 1 << 13
"""Length of the buffer of a response.  It must be less than `_LONG_READ_BYTES`: filling the buffer
must not wait for more bytes than a short response has.  The default depends on the version of
Python, and is 128 KiB in recent ones."""


class _TimedSocket(io.RawIOBase):
    """Reads from a socket; the socket's timeout limits all reads together."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw
        # A TLS socket returns one record at a time, so one call cannot fill a long buffer.
        self._is_plain = type(sock) is socket.socket
        seconds = sock.gettimeout()
        self._end = time.monotonic() + (math.inf if seconds is None else seconds)

    def restart(self, seconds: float) -> None:
        """Limit all reads from now on together to ``seconds``."""
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            msg = "timed out"
            raise TimeoutError(msg)
        if self._is_plain and len(memoryview(buffer)) >= _LONG_READ_BYTES and not math.isinf(left):
            return self._read_all(buffer, left)
        self._sock.settimeout(None if math.isinf(left) else left)
        return self._raw.readinto(buffer)

    def _read_all(self, buffer: Buffer, seconds: float) -> int:
        """Fill ``buffer`` with one system call; return the number of bytes.

        The number is smaller than the buffer if the stream ends, or the time runs out after some
        bytes.  A call for each packet would be slower, because each must take the GIL again.
        """
        # SO_RCVTIMEO limits the call as a whole, but only on a blocking socket.
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))
        try:
            return self._sock.recv_into(buffer, 0, socket.MSG_WAITALL)
        except BlockingIOError as error:
            msg = "timed out"
            raise TimeoutError(msg) from error

    def close(self) -> None:
        self._raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """A response with one time limit for all reads; see `_TimedSocket`."""

    def __init__(self, sock: socket.socket, *args: object, **options: object) -> None:
        """Prepare to read a response from ``sock``; see the base class."""
        super().__init__(sock, *args, **options)  # type: ignore[arg-type]
        self._timed = _TimedSocket(sock, self.fp.detach())
        self.fp = io.BufferedReader(self._timed, _BUFFER_BYTES)

    def _read_status(self) -> tuple[str, int, str]:
        """Read the status line of the final response; skip informational responses before it.

        The base class skips only those with status 100.  A server may send others as well, such as
        103 (early hints).  Status 101 is a final response.
        """
        while True:
            # The method is no part of the public interface.
            line: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if line[1] not in _SKIPPED_STATUS:
                return line
            http.client.parse_headers(self.fp)

    def restart_timeout(self, seconds: float) -> None:
        """Limit the time for reading the rest of the response to ``seconds``."""
        self._timed.restart(seconds)


class _TimedHTTPConnection(HTTPConnection):
    response_class = TimedResponse

    def _new_conn(self) -> socket.socket:
        return connect(self, self._dns_host)


class _TimedHTTPSConnection(HTTPSConnection):
    response_class = TimedResponse

    def connect(self) -> None:
        if self.ssl_context is None:
            self.ssl_context = tls_context()
        has_tls_proxy = self.proxy is not None and self.proxy.scheme == "https"
        if has_tls_proxy and self.proxy_config and self.proxy_config.ssl_context is None:
            self.proxy_config = self.proxy_config._replace(ssl_context=tls_context())
        super().connect()

    def _new_conn(self) -> socket.socket:
        return connect(self, self._dns_host)


class _TimedHTTPPool(HTTPConnectionPool):
    ConnectionCls = _TimedHTTPConnection


class _TimedHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _TimedHTTPSConnection


_POOLS: Final = {"http": _TimedHTTPPool, "https": _TimedHTTPSPool}


def make_pool(proxy: str | None, max_connections: int) -> urllib3.PoolManager:
    """Return a pool of connections with the time limits of this module.

    Args:
        proxy: The URL of a proxy, which may have a user and a password; None for no proxy.
        max_connections: Maximum number of connections that are kept for each host.

    Raises:
        HTTPError: The URL of the proxy cannot be used.
    """
    pool: urllib3.PoolManager
    if proxy is None:
        pool = urllib3.PoolManager(maxsize=max_connections)
    else:
        user = urllib3.util.parse_url(proxy).auth
        # urllib3 itself does not send the user and the password.
        headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
        pool = urllib3.ProxyManager(proxy, maxsize=max_connections, proxy_headers=headers)
    pool.pool_classes_by_scheme = _POOLS
    return pool
