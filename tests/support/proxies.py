"""A proxy of the tests, which connects to known hosts and refuses all others."""

from __future__ import annotations

import http.client
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        hosts: For each host with its port, as in a request, the port of loopback that serves it.
        asked: The host with its port of each request, in order.
        refused: Those of them that were refused.
        refusal: The status of a refusal.
    """

    hosts: dict[str, int]
    asked: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    refusal: int = 403
    port: int = 0

    @property
    def url(self) -> str:
        """The URL of the proxy."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def proxying(hosts: dict[str, int]) -> Iterator[Proxy]:
    """Run a proxy on loopback for the block."""
    state = Proxy(hosts)

    class Handler(_Handler):
        proxy = state

    server = _Server(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: clients may go away at any time."""


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_CONNECT(self) -> None:
        """Connect to a host, and pass bytes in both directions until one side ends."""
        port = self._port_of(self.path)
        self.close_connection = True
        if port is None:
            return
        with socket.create_connection(("127.0.0.1", port)) as other:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pass_on, args=(other, self.connection), daemon=True)
            back.start()
            _pass_on(self.connection, other)
            back.join()

    def do_GET(self) -> None:
        """Pass on a request without TLS."""
        url = urlsplit(self.path)
        port = self._port_of(url.netloc)
        if port is None:
            return
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            target = url._replace(scheme="", netloc="").geturl()
            connection.request(self.command, target, headers=dict(self.headers))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_PUT = do_GET  # noqa: N815  names of the base class

    def _port_of(self, host: str) -> int | None:
        """Return the port that serves a host; refuse the request and return None for others."""
        self.proxy.asked.append(host)
        port = self.proxy.hosts.get(host)
        if port is None:
            self.proxy.refused.append(host)
            self.send_response(self.proxy.refusal)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return port


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes from one socket to the other until the source ends."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
