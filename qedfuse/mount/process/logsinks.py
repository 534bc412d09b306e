"""Log handlers that never wait for the reader of the log.

The event loop writes the log, and serves no disk while it waits.  If the reader of the log stored
its files on one of the disks, the two would wait for each other forever.  So a message for which
the reader has no space is dropped and counted.  The number of dropped messages is logged later.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import syslog
from abc import abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_WRITE_BYTES: Final = select.PIPE_BUF
"""Maximum number of bytes in one write(2).  If poll(2) reports that a pipe is writable, the pipe
takes this number of bytes without waiting (pipe(7))."""


_PRIORITIES: Final = {
    "DEBUG": syslog.LOG_DEBUG,
    "INFO": syslog.LOG_INFO,
    "WARNING": syslog.LOG_WARNING,
    "ERROR": syslog.LOG_ERR,
    "CRITICAL": syslog.LOG_CRIT,
}
"""The priority in the system log for each level (syslog(3)).  `logging.handlers` has a similar
table, but loads modules that would delay every mount."""


class DroppingHandler(logging.Handler):
    """Sends messages without waiting, and counts the messages that it drops."""

    def __init__(self) -> None:
        """Start with no message dropped."""
        super().__init__()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message; if that is not possible without waiting, drop and count the message."""
        try:
            self._report_dropped()
            if self._dropped or not self.try_send(record):
                self._dropped += 1
        except Exception:  # noqa: BLE001  as in all handlers, because a bug must not fail a request
            self.handleError(record)

    def close(self) -> None:
        """Report the number of dropped messages if the reader has space, and close."""
        self.acquire()
        try:
            self._report_dropped()
        finally:
            self.release()
        super().close()

    def _report_dropped(self) -> None:
        """Send the number of messages that were dropped since the last report, unless it is 0."""
        if self._dropped:
            messages = "message was" if self._dropped == 1 else "messages were"
            text = f"{self._dropped} {messages} dropped here: the log accepted no message"
            report = logging.LogRecord(__name__, logging.WARNING, "", 0, text, (), None)
            if self.try_send(report):
                self._dropped = 0

    @abstractmethod
    def try_send(self, record: logging.LogRecord) -> bool:
        """Format and send a message without waiting; return whether the whole message was sent.

        After a failure a part of the message may have been sent.
        """


class StderrHandler(DroppingHandler):
    """Writes each message as one line to standard error."""

    def __init__(self, descriptor: int) -> None:
        """Write to ``descriptor``, which stays open."""
        super().__init__()
        self._descriptor = descriptor
        self._reopened = -1  # a descriptor to close, or -1
        if os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            # A terminal that is writable may block after few bytes, and another process may fill a
            # pipe between the poll and the write.  So both are opened again with O_NONBLOCK.  The
            # flag belongs to the new open file description, and does not affect other processes.
            # If this fails, polling alone must suffice.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with suppress(OSError):
                self._reopened = os.open(f"/proc/self/fd/{descriptor}", flags)
                self._descriptor = self._reopened
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def close(self) -> None:
        """Close the handler, and the descriptor that the constructor opened."""
        super().close()
        if self._reopened >= 0:
            os.close(self._reopened)
            self._reopened = -1

    def try_send(self, record: logging.LogRecord) -> bool:
        """Write a message in parts of at most `_MAX_WRITE_BYTES`."""
        data = (self.format(record) + "\n").encode(errors="backslashreplace")
        try:
            while data:
                # The descriptor may block if it was not opened again.
                if not self._poll.poll(0):
                    return False
                data = data[os.write(self._descriptor, data[:_MAX_WRITE_BYTES]) :]
        except OSError:
            return False
        return True


class SystemLogHandler(DroppingHandler):
    """Sends messages to the socket of a log daemon.

    Attributes:
        directory: A descriptor of the directory of the socket.
    """

    def __init__(self, directory: int, name: str) -> None:
        """Send to a socket; the first message connects to it.

        Args:
            directory: A descriptor of the directory of the socket, which `close` closes.
            name: The name of the socket in the directory.
        """
        super().__init__()
        self.directory = directory
        self._name = name
        self._connect = self.connect
        self._identity = f"qedfuse[{os.getpid()}]: "
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the handler, the connection and the directory."""
        super().close()
        self._disconnect()
        if self.directory >= 0:
            os.close(self.directory)
            self.directory = -1

    def connect_through(self, connect: Callable[[], socket.socket]) -> None:
        """Get connections from a function from now on, because the sandbox forbids connect(2).

        Args:
            connect: Returns what the method `connect` returns, and raises what that method raises.
        """
        self._connect = connect

    def connect(self) -> socket.socket:
        """Return a new non-blocking connection to the log daemon.

        Raises:
            OSError: The socket cannot be connected now, for example because no daemon listens.
        """
        return _connect(f"/proc/self/fd/{self.directory}/{self._name}")

    def try_send(self, record: logging.LogRecord) -> bool:
        """Send a message to the daemon; reconnect once if the connection is broken."""
        priority = syslog.LOG_DAEMON | _PRIORITIES.get(record.levelname, syslog.LOG_WARNING)
        text = f"<{priority}>{self._identity}{self.format(record)}\0"
        data = text.encode(errors="backslashreplace")
        return self._try_send_once(data) or (self._socket is None and self._try_send_once(data))

    def _try_send_once(self, data: bytes) -> bool:
        """Send a message, on a new connection if there is none; return whether all of it was sent.

        After a failure the connection is closed, unless the daemon had no space for any byte.
        """
        try:
            if self._socket is None:
                self._socket = self._connect()
            if self._socket.send(data) == len(data):
                return True
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._disconnect()
        return False

    def _disconnect(self) -> None:
        """Close the connection; the next message makes a new connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _connect(path: str) -> socket.socket:
    """Return a non-blocking connection to the datagram or stream socket of a log daemon.

    Raises:
        OSError: The socket cannot be connected now, for example because no daemon listens.
    """
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        connection = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            if error.errno != errno.EPROTOTYPE:
                raise
        else:
            return connection
    raise OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE), path)
