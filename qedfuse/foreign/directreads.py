"""Reads of qemu-nbd's disk by native threads, which answer the kernel without the event loop."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.hostio.hostcalls import host_calls
from qedfuse.util.threads import start_thread
from qedfuse.util.timeval import timeval

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.foreign.process import QemuNbd

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 16
"""Maximum number of reads in flight, one on each connection; tasks carry out further reads (the
slow path)."""
_MAX_READ_BYTES: Final = 32 << 20
"""Maximum length of a read; equal to MAX_EXPORT_READ_BYTES in ``hostio/_iothreads.c``."""
_MIN_PAUSE_SECONDS: Final = 1.0
_MAX_PAUSE_SECONDS: Final = 60.0
"""The first and the longest pause after a failure to connect; each further failure in a row doubles
the pause."""


class DirectReads:
    """Connections to qemu-nbd; at most one native thread uses a connection at a time.

    The first read that finds no connection starts a thread that makes all connections.  If a read
    fails, its connection is closed, and the caller repeats the read on the slow path.  If the
    thread can make no connection at all, all reads take the slow path during a pause.
    """

    def __init__(self, server: QemuNbd, size: int, seconds: float) -> None:
        """Prepare to read from the export of ``server``.

        Args:
            server: The process; no connection is made yet.
            size: The size of the export in bytes.
            seconds: Maximum time for which a read waits for its next bytes.
        """
        self._server = server
        self._size = size
        self._timeout = timeval(seconds)
        self._lock = threading.Lock()
        self._free: deque[socket.socket] = deque()
        self._all: set[socket.socket] = set()
        self._is_closed = False
        self._is_connecting = False  # whether the thread that makes connections runs
        self._pause_seconds = _MIN_PAUSE_SECONDS  # length of the pause after the next failure
        self._pause_end = 0.0  # by `time.monotonic`; until then the thread is not started

    def try_start(
        self,
        offset: int,
        view: memoryview,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read in a native thread; see `ReadableFile.try_start_read`.

        Returns False without the C extension, if no connection is free, or if the range is empty,
        too long or not within the disk.

        Raises:
            OSError: The extension has no thread yet, and could not create one.  ``ended`` is not
                called.
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
                # `_finish` closes the connection of a read when the read has ended.  If it were
                # closed here, another file could get the number of the descriptor that the thread
                # of the read still uses.
                connection.shutdown(socket.SHUT_RDWR)
            while self._free:
                self._drop(self._free.popleft())

    def _start_connecting(self) -> None:
        """Start the thread that makes connections, if there are none yet and no pause lasts."""
        with self._lock:
            if self._is_connecting or self._all or self._is_closed:
                return
            if time.monotonic() < self._pause_end:
                return
            self._is_connecting = True
        try:
            start_thread(self._make_connections, name="qedfuse nbd")
        except OSError as error:
            _log.debug("%s: no connection: %s", self._server.name, error.strerror)
            self._end_connecting(made=0)

    def _make_connections(self) -> None:
        """Make the connections; stop at the first error, because any number of them suffices."""
        made = 0
        try:
            while made < _MAX_CONNECTIONS and self._make_connection():
                made += 1
        except OSError as error:
            _log.debug("%s: no further connection: %s", self._server.name, error)
        finally:
            self._end_connecting(made)

    def _make_connection(self) -> bool:
        """Make a connection; return False if `close` was called."""
        connection = self._server.connect_negotiated()
        connection.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, self._timeout)
        with self._lock:
            if self._is_closed:
                connection.close()
                return False
            self._all.add(connection)
            self._free.append(connection)
        return True

    def _end_connecting(self, made: int) -> None:
        """Record that the thread has ended, and begin a pause if it made no connection."""
        with self._lock:
            self._is_connecting = False
            if made:
                self._pause_seconds = _MIN_PAUSE_SECONDS
            else:
                self._pause_end = time.monotonic() + self._pause_seconds
                self._pause_seconds = min(2 * self._pause_seconds, _MAX_PAUSE_SECONDS)

    def _finish(
        self,
        connection: socket.socket,
        length: int,
        ended: Callable[[int], object],
        result: int,
        _nanoseconds: int,
    ) -> None:
        """Take back the connection of a read that has ended, and pass its result to ``ended``.

        ``length`` is the number of bytes requested.  ``result`` is the number of bytes read, or a
        negative errno.
        """
        with self._lock:
            if result == length and not self._is_closed:
                # A load with few reads in flight uses few connections, because the connection that
                # was used last is used next.
                self._free.appendleft(connection)
            else:
                self._drop(connection)
        ended(result)

    def _drop(self, connection: socket.socket) -> None:
        """Close a connection that no thread uses; the caller holds the lock."""
        self._all.discard(connection)
        connection.close()
