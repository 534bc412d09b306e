"""The exceptions that the modules of `nbd` raise for each other.

Readers of a file get a `qedfuse.errors.RemoteError` instead.
"""

from __future__ import annotations


class BrokenError(Exception):
    """A connection broke or could not be made; a new connection may succeed."""


class ProtocolError(BrokenError):
    """The server has sent what the protocol does not allow; the connection must not be used."""


class RefusedError(Exception):
    """The server does not serve the export, or this client cannot use the export.

    Attributes:
        errno: The error number for readers.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class ReplyError(Exception):
    """The server has answered a request with an error.

    Attributes:
        errno: The error, as an error number of this host.
        text: The message of the server; empty if the server has sent none.
    """

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(errno, text)
        self.errno = errno
        self.text = text
