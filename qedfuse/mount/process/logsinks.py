"""Log handlers that never wait for the reader of the log.

The event loop logs, and while it waits no disk is served.  The reader of the log may even
wait for one of the disks, if it stores its files there.  So a message for which the reader has
no space now is dropped and counted, and the number is logged before the next message.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from abc import abstractmethod
from contextlib import suppress
from logging.handlers import SysLogHandler
from typing import Final

_MAX_WRITE_BYTES: Final = select.PIPE_BUF
"""Bytes that a pipe or a socket takes without waiting if poll(2) reports that it is writable."""


class DroppingHandler(logging.Handler):
    """Sends messages without waiting, and counts the messages that it drops."""

    def __init__(self) -> None:
        """Start with no message dropped."""
        super().__init__()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message, or drop it."""
        try:
            self._report_dropped()
            if self._dropped or not self.try_send(record):
                self._dropped += 1
        except Exception:  # noqa: BLE001  as in every handler: a bug here must not fail a request
            self.handleError(record)

    def close(self) -> None:
        """Report the number of dropped messages, if the reader takes messages again."""
        self.acquire()
        try:
            self._report_dropped()
        finally:
            self.release()
        super().close()

    def _report_dropped(self) -> None:
        """Send the number of messages that were dropped since the last report."""
        if self._dropped:
            messages = "message was" if self._dropped == 1 else "messages were"
            text = f"{self._dropped} {messages} dropped here: the reader of the log was too slow"
            report = logging.LogRecord(__name__, logging.WARNING, "", 0, text, (), None)
            if self.try_send(report):
                self._dropped = 0

    @abstractmethod
    def try_send(self, record: logging.LogRecord) -> bool:
        """Format and send a message; return False if it would wait; part may have been sent."""


class StderrHandler(DroppingHandler):
    """Writes each message as one line to standard error."""

    def __init__(self, descriptor: int) -> None:
        """Write to ``descriptor``, which stays open."""
        super().__init__()
        self._descriptor = descriptor
        self._own = -1
        if os.isatty(descriptor):
            # A writable terminal may take fewer bytes and then block.  With O_NONBLOCK on a
            # separate open file description it does not block, and the shell, which shares
            # the original one, is not affected.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with suppress(OSError):
                self._own = os.open(f"/proc/self/fd/{descriptor}", flags)
                self._descriptor = self._own
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def close(self) -> None:
        """Close the handler and the description that was opened for a terminal."""
        super().close()
        if self._own >= 0:
            os.close(self._own)
            self._own = -1

    def try_send(self, record: logging.LogRecord) -> bool:
        """Write in parts that a writable pipe takes without waiting; see `DroppingHandler`."""
        data = (self.format(record) + "\n").encode(errors="backslashreplace")
        try:
            while data:
                # poll(2) instead of O_NONBLOCK, which would affect other users of the pipe.
                if not self._poll.poll(0):
                    return False
                data = data[os.write(self._descriptor, data[:_MAX_WRITE_BYTES]) :]
        except OSError:
            return False
        return True


class SystemLogHandler(DroppingHandler):
    """Sends messages to the socket of a log daemon."""

    def __init__(self, path: str) -> None:
        """Send to the socket at ``path``; the first message connects to it."""
        super().__init__()
        self._path = path
        self._identity = f"qedfuse[{os.getpid()}]: "
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Close the handler and the connection."""
        super().close()
        self._disconnect()

    def try_send(self, record: logging.LogRecord) -> bool:
        """Send to the daemon, and reconnect if it was restarted; see `DroppingHandler`."""
        name = SysLogHandler.priority_map.get(record.levelname, "warning")
        priority = SysLogHandler.LOG_DAEMON << 3 | SysLogHandler.priority_names[name]
        text = f"<{priority}>{self._identity}{self.format(record)}\0"
        data = text.encode(errors="backslashreplace")
        return self._try_send_once(data) or (self._socket is None and self._try_send_once(data))

    def _try_send_once(self, data: bytes) -> bool:
        """Send over the current or a new connection; disconnect if that is broken."""
        try:
            if self._socket is None:
                self._socket = _connect(self._path)
            if self._socket.send(data) == len(data):
                return True
        except BlockingIOError:
            return False
        except OSError:
            pass
        self._disconnect()
        return False

    def _disconnect(self) -> None:
        """Close the connection; the next message makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _connect(path: str) -> socket.socket:
    """Return a non-blocking connection to the socket of a log daemon.

    Raises:
        OSError: No daemon listens on the socket.
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
