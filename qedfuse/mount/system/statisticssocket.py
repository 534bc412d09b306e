"""The socket beside the record of a mount, from which a program reads the mount's statistics.

The server sends one JSON document on each connection, and closes the connection.  The socket lies
beside the mount record, and has the name of the record followed by `STATISTICS_SUFFIX`.  Its mode
admits only the user of the server and root.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import trio

_BACKLOG: Final = 16
"""Maximum number of connections that wait to be accepted."""
_CREDENTIALS: Final = struct.Struct("iII")
"""``struct ucred`` of unix(7): pid, uid, gid."""
_MAX_DOCUMENT_BYTES: Final = 1 << 28
"""Maximum length of a document that is read."""
_RECEIVE_BYTES: Final = 1 << 16


class UnusableServerError(Exception):
    """The server of a socket is not trusted, or sends too much; the text says which."""


def listen(directory: int, name: str) -> socket.socket:
    """Make a listening socket that only this user and root can connect to.

    Args:
        directory: A descriptor of the socket's directory.
        name: The name of the socket in the directory.

    Raises:
        OSError: A system call failed, or a file of this name exists (EADDRINUSE).
    """

    def prepare(made: socket.socket) -> None:
        # bind(2) makes the file with the mode of the descriptor (unix_bind in net/unix/af_unix.c),
        # so there is no moment at which another user can connect.
        os.fchmod(made.fileno(), 0o600)

    return listen_at(socket.AF_UNIX, _path(directory, name), prepare)


def listen_at(
    family: socket.AddressFamily,
    address: str | tuple[str, int],
    prepare: Callable[[socket.socket], None],
) -> socket.socket:
    """Make a listening stream socket in non-blocking mode.

    Args:
        family: The address family of the socket.
        address: The address of the socket (`socket.socket.bind`).
        prepare: Called with the socket, before the socket is bound.

    Raises:
        OSError: A system call failed.
    """
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        prepare(made)
        made.bind(address)
        made.listen(_BACKLOG)
        made.setblocking(False)  # noqa: FBT003  its only parameter
    except BaseException:
        made.close()
        raise
    return made


def receive(directory: int, name: str, users: Collection[int]) -> bytes:
    """Return the document of the server that listens on a socket.

    Args:
        directory: A descriptor of the socket's directory.
        name: The name of the socket.
        users: The users as which the server may run.  Another user may have put a link in place of
            the socket.

    Returns:
        The document, or only its beginning if the server ends meanwhile.

    Raises:
        UnusableServerError: The server runs as another user, or the document is too long.
        OSError: There is no socket, no process listens on it, or the connection broke.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(_path(directory, name))
        user = peer_user(connection)
        if user not in users:
            expected = " or ".join(str(one) for one in users)
            msg = f"found a server of user {user} at its socket, expected one of user {expected}"
            raise UnusableServerError(msg)
        received = bytearray()
        while part := connection.recv(_RECEIVE_BYTES):
            received += part
            if len(received) > _MAX_DOCUMENT_BYTES:
                msg = f"found a document of more than {_MAX_DOCUMENT_BYTES} bytes"
                raise UnusableServerError(msg)
    return bytes(received)


def peer_user(connection: socket.socket | trio.socket.SocketType) -> int:
    """Return the uid of the peer of a connection.

    The uid of a client is the one that it had at connect(2), and that of a server at listen(2).

    Raises:
        OSError: The socket was closed, or a system call failed.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return int(uid)


def _path(directory: int, name: str) -> str:
    """Return a path of a file in a directory, short enough for the address of a socket."""
    return f"/proc/self/fd/{directory}/{name}"
