"""Notifying the service manager, such as systemd, of the state of a mount (sd_notify(3)).

The socket is connected before the mount exists.  If the serving process connected later, and the
path of the socket led through the mount, the process would wait forever for its own reply.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    import threading


class ServiceManager:
    """The connection to the service manager that has started this process, if there is one."""

    def __init__(self) -> None:
        """Connect to the socket in ``NOTIFY_SOCKET``; if that fails, `notify` does nothing."""
        self._socket: socket.socket | None = None
        self._sender: threading.Thread | None = None
        address = os.environ.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return
        if address.startswith("@"):  # "@" stands for NUL, with which an abstract name begins
            address = "\0" + address[1:]
        with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            undo.callback(connection.close)
            connection.connect(os.fsencode(address))
            undo.pop_all()
            self._socket = connection

    def notify(self, state: str) -> None:
        """Send a line such as ``READY=1``, if there is a manager.

        This method never waits, because a manager that is stopped must not stop the disks.  If
        the socket is full, a thread waits and then sends the line.
        """
        if self._socket is None:
            return
        with contextlib.suppress(OSError):
            if self._sender is None:
                try:
                    self._socket.send(state.encode(), socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass
                else:
                    return
            with contextlib.ExitStack() as undo:
                own = undo.enter_context(self._socket.dup())
                self._sender = start_thread(_send_after, self._sender, own, state)
                undo.pop_all()  # the thread closes the socket

    def close(self) -> None:
        """Disconnect; `notify` does nothing from then on.

        A thread that still waits has a descriptor of its own, and may send its line later.
        """
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _send_after(earlier: threading.Thread | None, connection: socket.socket, state: str) -> None:
    """Wait for the end of the thread ``earlier``; send a line, and close the connection."""
    if earlier is not None:
        earlier.join()
    with connection, contextlib.suppress(OSError):
        connection.send(state.encode())
