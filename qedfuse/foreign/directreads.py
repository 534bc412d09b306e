"""Reads of qemu-nbd's disk by native threads, which answer the kernel without the event loop."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.hostio.hostcalls import host_calls

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.foreign.process import QemuNbd

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 16
"""Maximum number of reads in flight, one on each connection; further reads take the slow path."""
_MAX_READ_BYTES: Final = 32 << 20
"""Maximum length of a read; the same as MAX_EXPORT_READ_BYTES in ``hostio/_iothreads.c``."""


class DirectReads:
    """Connections to qemu-nbd, each of which at most one native thread uses at a time.

    The first read that finds no connection starts a thread that makes all connections.  If a read
    fails, its connection is closed, and the caller repeats the read on the slow path.  If this was
    the last connection, the next read starts the thread again.  If the thread can make no
    connection at all, it is not started again, and all reads take the slow path.
    """

    def __init__(self, server: QemuNbd, size: int, seconds: float) -> None:
        """Prepare to read from the export of ``server``.

        Args:
            server: The process; the constructor makes no connection.
            size: The size of the export in bytes.
            seconds: Maximum time in seconds for which a read waits for its next bytes.
        """
        self._server = server
        self._size = size
        # The kernel takes two longs: seconds and microseconds.
        self._timeout = struct.pack("ll", int(seconds), 0)
        self._lock = threading.Lock()
        self._free: deque[socket.socket] = deque()
        self._all: set[socket.socket] = set()
        self._is_closed = False
        self._should_connect = True  # when a read finds no connection

    def try_start(
        self,
        offset: int,
        view: memoryview,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read in a native thread; see `ReadableFile.try_start_read`.

        Returns False if there are no native threads, no connection is free, the range does not lie
        within the disk, or the view is empty or longer than `_MAX_READ_BYTES`.
        """
        calls = host_calls()
        if not calls.can_start_reads or not 0 < len(view) <= _MAX_READ_BYTES:
            return False
        if offset + len(view) > self._size:
            return False
        try:
            connection = self._free.popleft()
        except IndexError:
            self._start_connecting()
            return False
        finish = partial(self._finish, connection, len(view), ended)
        try:
            calls.start_export_read(connection.fileno(), offset, view, take_answer(), finish)
        except BaseException:
            self._free.append(connection)
            raise
        return True

    def close(self) -> None:
        """Make all reads in flight fail, and all later calls of `try_start` return False."""
        with self._lock:
            self._is_closed = True
            for connection in self._all:
                # The thread of the read closes the connection: if it were closed here, another file
                # could get the number of the descriptor that the thread uses.
                connection.shutdown(socket.SHUT_RDWR)
            while self._free:
                self._drop(self._free.popleft())

    def _start_connecting(self) -> None:
        """Start the thread that makes connections, unless it was started before.

        After all connections have been lost, the thread is started once more.
        """
        with self._lock:
            should_connect, self._should_connect = self._should_connect, False
        if should_connect:
            threading.Thread(target=self._make_connections, name="qedfuse nbd", daemon=True).start()

    def _make_connections(self) -> None:
        """Make the connections; stop at the first error, because fewer connections suffice."""
        for _ in range(_MAX_CONNECTIONS):
            try:
                connection = self._server.connect_negotiated()
            except OSError as error:
                _log.debug("%s: no further connection: %s", self._server.name, error)
                return
            connection.settimeout(None)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, self._timeout)
            with self._lock:
                self._all.add(connection)
                if self._is_closed or len(self._all) > _MAX_CONNECTIONS:
                    self._drop(connection)
                    return
                self._free.append(connection)

    def _finish(
        self,
        connection: socket.socket,
        length: int,
        ended: Callable[[int], object],
        result: int,
        _nanoseconds: int,
    ) -> None:
        """Take back the connection of a read that has ended; close it if the read has failed."""
        with self._lock:
            if result == length and not self._is_closed:
                # The connection that was used last is used next, so that a load with few reads in
                # flight uses few connections.
                self._free.appendleft(connection)
            else:
                self._drop(connection)
                self._should_connect = not self._all and not self._is_closed
        ended(result)

    def _drop(self, connection: socket.socket) -> None:
        """Close a connection that no thread uses; the caller holds the lock."""
        self._all.discard(connection)
        connection.close()
