"""The metrics of a mount over HTTP, for ``-o metrics=ADDRESS``: ``GET /metrics``.

The module implements only what Prometheus and curl need of HTTP/1.0.  It answers one request per
connection, and ignores the headers of the request.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qedfuse.mount.statistics.connections import serve_connections
from qedfuse.mount.statistics.prometheus import CONTENT_TYPE, exposition

if TYPE_CHECKING:
    import socket

    import trio

    from qedfuse.mount.statistics.document import StatisticsSource

_MAX_REQUEST_BYTES: Final = 1 << 14
_END_OF_HEADERS: Final = re.compile(rb"\n\r?\n")
_PATHS: Final = (b"/metrics", b"/")


async def serve_metrics(listening: socket.socket, source: StatisticsSource) -> None:
    """Answer HTTP requests for the metrics until cancelled."""

    async def answer(stream: trio.SocketStream) -> None:
        request = await _receive_request(stream)
        words = request.partition(b"\n")[0].removesuffix(b"\r").split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/"):  # noqa: PLR2004
            await stream.send_all(_response("400 Bad Request", b"expected GET /metrics\n"))
        elif words[0] not in (b"GET", b"HEAD"):
            await stream.send_all(_response("405 Method Not Allowed", b"expected GET\n"))
        elif words[1].partition(b"?")[0] not in _PATHS:
            await stream.send_all(_response("404 Not Found", b"expected /metrics\n"))
        else:
            body = exposition([await source.document()]).encode()
            response = _response("200 OK", body)
            await stream.send_all(response[: -len(body)] if words[0] == b"HEAD" else response)
        await stream.send_eof()

    await serve_connections(listening, answer)


async def _receive_request(stream: trio.SocketStream) -> bytes:
    """Return a request with its headers; only its beginning if it is cut off or too long."""
    request = bytearray()
    # A line may also end without CR (RFC 9112, section 2.2), as in a request typed into netcat.
    while not _END_OF_HEADERS.search(request) and len(request) < _MAX_REQUEST_BYTES:
        part = await stream.receive_some(_MAX_REQUEST_BYTES)
        if not part:
            break
        request += part
    return bytes(request)


def _response(status: str, body: bytes) -> bytes:
    """Return an HTTP response."""
    head = (
        f"HTTP/1.0 {status}\r\nContent-Type: {CONTENT_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
