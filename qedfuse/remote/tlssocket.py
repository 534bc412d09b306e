"""TLS sockets that are closed if the peer has gone before the handshake.

Before the handshake, Python's own class asks for the address of the peer.  If the connection has
been reset, the class can return a socket without TLS, and the request would be written to it
without encryption.  Or the class raises an exception and leaves its socket open.
"""

from __future__ import annotations

import errno
import os
import ssl
from typing import Any

from urllib3.util.ssl_ import create_urllib3_context


class _ClosingSocket(ssl.SSLSocket):
    """A socket that closes itself if the peer has gone when the handshake would begin."""

    def getpeername(self) -> Any:  # noqa: ANN401 - its type depends on the address family
        """Return the address of the peer; close the socket if the peer has gone too early."""
        try:
            return super().getpeername()
        except OSError as error:
            if self.version() is not None:
                raise
            self.close()
            # Not ENOTCONN, because after this error Python would go on without TLS.
            code = errno.ECONNRESET if error.errno == errno.ENOTCONN else error.errno
            raise OSError(code, os.strerror(code or 0)) from error


def tls_context() -> ssl.SSLContext:
    """Return a new context for one connection, which trusts the authorities of the system.

    Connections of several threads must not share a context, because urllib3 changes contexts.
    """
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
    context.load_default_certs()
    context.sslsocket_class = _ClosingSocket
    return context
