"""A server of the tests that gives the keys of roles, as the services of three clouds do."""

from __future__ import annotations

import json
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SILENCE_SECONDS: Final = 30.0
SESSION: Final = "session-of-the-instance"
"""The token that Amazon's metadata service gives before it answers other requests."""
ROLE: Final = "vm-role"


@dataclass
class KeyService:
    """A running service.

    Attributes:
        lifetime_seconds: How long a key is valid; negative for a key that has expired.
        status: The status of each answer.
        garbage: The body of each answer in place of a key; empty for a key.
        is_silent: Whether requests get no answer.
        requests: Method, path and headers of each request.
        keys: How many keys were given.
    """

    lifetime_seconds: float = 3600.0
    status: int = 200
    garbage: bytes = b""
    is_silent: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    keys: int = 0
    port: int = 0
    scheme: str = "http"
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """The URL of the service."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def header(self, name: str) -> list[str]:
        """Return the values of a header in all requests; "" for each that lacks it."""
        return [headers.get(name, "") for _, _, headers in self.requests]

    def answer(self, method: str, path: str) -> bytes:
        """Return the body of the answer to a request."""
        if method == "PUT" and path == "/latest/api/token":
            return SESSION.encode()
        if path.endswith("/security-credentials/"):
            return ROLE.encode()
        if self.garbage:
            return self.garbage
        with self.lock:
            self.keys += 1
            number = self.keys
        end = datetime.now(UTC) + timedelta(seconds=self.lifetime_seconds)
        if method == "POST":
            return _STS.format(number=number, end=end.strftime("%Y-%m-%dT%H:%M:%SZ")).encode()
        if path.startswith(("/computeMetadata/", "/msi")):
            fields = {
                "access_token": f"bearer-{number}",
                "token_type": "Bearer",
                "expires_in": max(0, int(self.lifetime_seconds)),
                "expires_on": str(int(time.time() + self.lifetime_seconds)),
            }
        else:
            fields = {
                "AccessKeyId": f"KEY{number}",
                "SecretAccessKey": "secret",
                "Token": f"token-{number}",
                "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        return json.dumps(fields).encode()


_STS: Final = """<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult>
<Credentials><SessionToken>token-{number}</SessionToken><SecretAccessKey>secret</SecretAccessKey>
<Expiration>{end}</Expiration><AccessKeyId>KEY{number}</AccessKeyId></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


@contextmanager
def giving_keys(certificate: Path | None = None) -> Iterator[KeyService]:
    """Run the service on loopback for the block; with TLS if there is a certificate.

    The file of the certificate has its key as well.
    """
    state = KeyService()

    class Handler(_Handler):
        service = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    state.port = server.server_address[1]
    if certificate is not None:
        state.scheme = "https"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    service: KeyService

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer with a key, or as the test demands."""
        service = self.service
        headers = {name.lower(): value for name, value in self.headers.items()}
        service.requests.append((self.command, self.path, headers))
        if service.is_silent:
            service.ended.wait(_SILENCE_SECONDS)
            self.close_connection = True
            return
        body = service.answer(self.command, self.path) if service.status == 200 else b"no"
        self.send_response(service.status)
        self.send_header("Content-Length", str(len(body)))
        # A kept connection would hide that a sandbox forbids to connect.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_GET  # noqa: N815  names of the base class
