"""A web server of the tests, which serves one object and makes the faults that a test asks for.

A real server is faultless most of the time.  This one breaks its promises in one way at a time, and
counts how often it did, so that a test can assert that its fault has struck.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Fault: TypeAlias = Literal[
    "half",
    "longer",
    "chunked",
    "chunked longer",
    "stall",
    "trickle",
    "status 503",
    "status 500",
    "status 403",
    "status 404",
    "status 416",
    "status 418",
    "status 429",
    "slow header",
    "endless",
    "no range",
    "other range",
    "other etag",
    "no etag",
    "other size",
    "reset",
    "silence",
    "gzip",
    "redirect",
    "redirect elsewhere",
    "redirect loop",
    "garbage",
]

_STALL_SECONDS: Final = 30.0
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class WebServer:
    """A running server and what it does.

    Attributes:
        content: The bytes of the object.
        etag: The entity tag; empty for none.
        modified: Time of the last change in seconds since 1970; None for none.
        obeys_conditions: Whether If-Match and If-Unmodified-Since are obeyed.
        faults: What goes wrong with the next requests, in order; the rest is served well.
        always: What goes wrong with every request for data; None for nothing.
        heads_fail: Whether what goes wrong goes wrong with HEAD requests too, as far as a response
            without a body can show it.
        struck: How often each fault has struck.
        requests: The ranges (first, last) of the requests that were served well.
        extra: Headers that replace those of the answers with data.
        delay_seconds: How long each answer is delayed.
        healthy: How many of the next requests are served well, before any fault.
        others: Further objects, by their paths; each has the validators of the first one.
        required: What the header ``Authorization`` of each request must contain.
        refusal: The status of the answer to a request without it.
        error_body: The body of each answer with a status that a test asks for.
        authorizations: The headers ``Authorization`` of all requests; "" for none.
        headers: All headers of each request.
    """

    content: bytes = b""
    etag: str = '"one"'
    modified: float | None = 1_000_000_000.0
    obeys_conditions: bool = True
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    heads_fail: bool = False
    struck: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[int, int]] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    healthy: int = 0
    others: dict[str, bytes] = field(default_factory=dict)
    required: str = ""
    refusal: int = 403
    error_body: bytes = b""
    authorizations: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    scheme: str = "http"
    port: int = 0
    elsewhere: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """The URL of the object."""
        return f"{self.scheme}://127.0.0.1:{self.port}/images/disk.qed"

    @property
    def sent_bytes(self) -> int:
        """How many bytes of the object were sent well."""
        return sum(last - first + 1 for first, last in self.requests)

    def next_fault(self) -> Fault | None:
        """Take the fault for a request and count it."""
        with self.lock:
            if self.healthy:
                self.healthy -= 1
                return None
            fault = self.faults.pop(0) if self.faults else self.always
            if fault is not None:
                self.struck[fault] += 1
            return fault


@contextmanager
def serving(content: bytes, certificate: Path | None = None) -> Iterator[WebServer]:
    """Serve ``content`` on loopback for the block; with TLS if there is a certificate.

    The file of the certificate has its key as well.
    """
    state = WebServer(content)

    class Handler(_Handler):
        server_state = state

    server = _Server(("127.0.0.1", 0), Handler)
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: clients may go away at any time."""


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server_state: WebServer

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        """Answer as QEMU and clients of stores need it before they read."""
        state = self.server_state
        if self._is_unauthorized() or (state.always or "").startswith("status "):
            # Like a real server, without the body that says why.
            self._send(state.refusal, {"Content-Length": "0"})
            return
        fails = state.heads_fail and not self.path.startswith("/moved")
        fault = state.next_fault() if fails else None
        if self._break(fault):
            return
        length = len(state.others.get(self.path, state.content)) + 512 * (fault == "other size")
        headers = {"Content-Length": str(length), "Accept-Ranges": "bytes"}
        etag = {"no etag": "", "other etag": '"another"'}.get(fault or "", state.etag)
        self._send(200, headers | self._validators(etag))

    def do_GET(self) -> None:
        """Answer a request for a range, with the next fault."""
        state = self.server_state
        if state.delay_seconds:
            state.ended.wait(state.delay_seconds)
        if self._is_unauthorized():
            self._send_error(state.refusal)
            return
        fault = state.next_fault()
        if self.path.startswith("/moved"):
            fault = None
        if not self._break(fault):
            self._serve(fault)

    def _break(self, fault: Fault | None) -> bool:  # noqa: C901  one branch a fault
        """Make a fault in place of an answer; return False if the fault is one of a range."""
        state = self.server_state
        if fault is not None and fault.startswith("status "):
            self._send_error(int(fault.split()[1]))
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
        elif fault == "silence":
            state.ended.wait(_STALL_SECONDS)
            self.close_connection = True
        elif fault == "garbage":
            self.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n" * 10)
            self.close_connection = True
        elif fault == "slow header":
            while not state.ended.wait(0.1):
                self.wfile.write(b"H")
            self.close_connection = True
        elif fault == "endless":
            self._send(503, {"Transfer-Encoding": "chunked"})
            while not state.ended.wait(0.01):
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            self.close_connection = True
        elif fault == "redirect":
            self._send(302, {"Location": "/moved/disk.qed", "Content-Length": "0"})
        elif fault == "redirect elsewhere":
            self._send(302, {"Location": state.elsewhere, "Content-Length": "0"})
        elif fault == "redirect loop":
            with state.lock:
                state.faults.insert(0, "redirect loop")
            self._send(302, {"Location": self.path, "Content-Length": "0"})
        else:
            return False
        return True

    def _serve(self, fault: Fault | None) -> None:  # noqa: C901, PLR0912, PLR0915  a branch a fault
        """Send the range, wrongly if there is a fault."""
        state = self.server_state
        content, etag = state.others.get(self.path, state.content), state.etag
        if self._is_refused(etag):
            self._send(412, {"Content-Length": "0"})
            return
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if not content and (match is None or fault == "no range"):
            headers = {"Content-Length": "0", **self._validators(etag), **state.extra}
            self._send(200, headers)
            return
        assert match is not None, self.headers
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        if first >= len(content):
            self._send(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return
        body = content[first : last + 1]
        headers = {
            "Content-Range": f"bytes {first}-{last}/{len(content)}",
            "Content-Length": str(len(body)),
        }
        if fault == "no range":
            del headers["Content-Range"]
            self._send(200, {**headers, **self._validators(etag)}, body)
            return
        if fault == "other range":
            headers["Content-Range"] = f"bytes {first + 512}-{last + 512}/{len(content)}"
        if fault == "other size":
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content) + 512}"
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        if fault == "other etag":
            etag = '"another"'
            body = bytes(byte ^ 255 for byte in body)
        headers.update(self._validators("" if fault == "no etag" else etag))
        headers.update(state.extra)
        if fault == "longer":
            headers["Content-Length"] = str(len(body) + 512)
            self._send(206, headers, body + bytes(512))
        elif fault in {"chunked", "chunked longer"}:
            del headers["Content-Length"]
            body += bytes(512) if fault == "chunked longer" else b""
            headers["Transfer-Encoding"] = "chunked"
            self._send(206, headers, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        elif fault == "half":
            self._send(206, headers, body[: len(body) // 2])
            self.close_connection = True
        elif fault == "stall":
            self._send(206, headers, body[: len(body) // 2])
            state.ended.wait(_STALL_SECONDS)
            self.close_connection = True
        elif fault == "trickle":
            self._send(206, headers)
            for byte in body:
                if state.ended.wait(0.2):
                    break
                self.wfile.write(bytes([byte]))
            self.close_connection = True
        else:
            if fault is None:
                with state.lock:
                    state.requests.append((first, last))
            self._send(206, headers, body)

    def _is_unauthorized(self) -> bool:
        """Return whether a request lacks what its header must have; note the header."""
        found = self.headers.get("Authorization", "")
        with self.server_state.lock:
            self.server_state.authorizations.append(found)
            self.server_state.headers.append(dict(self.headers))
        return self.server_state.required not in found

    def _is_refused(self, etag: str) -> bool:
        """Return whether a condition of the request does not hold."""
        state = self.server_state
        if not state.obeys_conditions:
            return False
        if "If-Match" in self.headers:
            return self.headers["If-Match"] != etag
        since = self.headers.get("If-Unmodified-Since")
        return bool(since) and since != formatdate(state.modified, usegmt=True)

    def _validators(self, etag: str) -> dict[str, str]:
        """Return the headers by which a version is known."""
        state = self.server_state
        headers = {"ETag": etag} if etag else {}
        if state.modified is not None:
            headers["Last-Modified"] = formatdate(state.modified, usegmt=True)
        return headers

    def _send_error(self, status: int) -> None:
        """Send an answer without data."""
        body = self.server_state.error_body if self.command == "GET" else b""
        self._send(status, {"Content-Length": str(len(body))}, body)

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


PATIENCE: Final = "remote_timeout=600,remote_attempt_timeout=600"
"""Options of a mount whose waits for a server outlast the test: what ends earlier did not wait."""


def wait_until(condition: object, seconds: float = 60.0) -> None:
    """Wait until a callable returns true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
