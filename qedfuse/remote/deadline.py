"""Connections of urllib3 whose timeouts limit connecting as a whole, and a response as a whole.

The timeout of a socket applies to each read separately.  With that timeout alone, a server that
sends one byte before each timeout could block a thread without limit, in the header as well as in
the body.
"""

from __future__ import annotations

import http.client
import io
import math
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import urllib3
import urllib3.util
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from qedfuse.remote.connecting import connect
from qedfuse.remote.tlssocket import tls_context

if TYPE_CHECKING:
    import socket

    from typing_extensions import Buffer


class _TimedSocket(io.RawIOBase):
    """The reading end of a socket, whose timeout at the beginning limits all reads together."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock = sock
        self._raw = raw
        seconds = sock.gettimeout()
        self._end = time.monotonic() + (math.inf if seconds is None else seconds)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            msg = "timed out"
            raise TimeoutError(msg)
        self._sock.settimeout(None if math.isinf(left) else left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """A response all of which is read within the timeout that the socket has at the beginning."""

    def __init__(self, sock: socket.socket, *args: object, **options: object) -> None:
        super().__init__(sock, *args, **options)  # type: ignore[arg-type]
        raw = self.fp.detach()
        self.fp = io.BufferedReader(_TimedSocket(sock, raw))


class _TimedHTTPConnection(HTTPConnection):
    response_class = _TimedResponse

    def _new_conn(self) -> socket.socket:
        return connect(self, self._dns_host)


class _TimedHTTPSConnection(HTTPSConnection):
    response_class = _TimedResponse

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
    """Return a pool of connections whose timeouts apply to whole responses.

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
