"""The connections to one export: made when they are needed, and again after they broke."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.nbd.failures import BrokenError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.nbd.connection import Connection

MAX_CONNECTIONS: Final = 4
_REST_SECONDS: Final = 60.0
"""For how long no connection is tried again in a place where it failed, if others work."""


class Link:
    """The place of one connection.  Threads and tasks may use it concurrently.

    Attributes:
        rests_until: Until when no connection is made here, if there is one in another place.
    """

    def __init__(self, make: Callable[[], Connection], connection: Connection | None) -> None:
        """Make connections with ``make``, which blocks; the first one may be given."""
        self._make = make
        self._lock = threading.Lock()
        self._connection = connection
        self._failed_at = 0.0
        self._failure: BrokenError | None = None
        self._is_closed = False
        self.rests_until = 0.0

    @property
    def ready(self) -> Connection | None:
        """The connection; None if there is none that works."""
        connection = self._connection
        return None if connection is None or connection.is_broken else connection

    @property
    def in_flight(self) -> int:
        """How many replies are expected."""
        connection = self._connection
        return 0 if connection is None else connection.in_flight

    def connect(self, since: float) -> Connection:
        """Return the connection, after making one if there is none; blocks the thread.

        Args:
            since: When the caller has begun to wait (`time.monotonic`).  If an attempt of
                another caller has failed since then, no further one is made.

        Raises:
            BrokenError: The connection cannot be made.
        """
        with self._lock:
            connection = self.ready
            if connection is not None:
                return connection
            if self._failure is not None and self._failed_at >= since:
                raise BrokenError(*self._failure.args)
            try:
                connection = self._make()
            except BrokenError as error:
                self._failed_at, self._failure = time.monotonic(), error
                raise
            self._connection, self._failure = connection, None
        if self._is_closed:
            connection.close()
        return connection

    def close(self) -> None:
        """Close the connection, also one that is being made."""
        self._is_closed = True
        connection = self._connection
        if connection is not None:
            connection.close()


class Links:
    """Up to `MAX_CONNECTIONS` connections to one export.

    Attributes:
        is_closed: Whether `close` was called.
    """

    def __init__(self, make: Callable[[], Connection], first: Connection) -> None:
        """Use ``first``, and further connections of ``make`` if the server allows several."""
        self.is_closed = False
        count = MAX_CONNECTIONS if first.export.can_multi_conn else 1
        self._links = [Link(make, None if index else first) for index in range(count)]
        # A thread that waits for a server takes none from calls on local files.
        self._threads = trio.CapacityLimiter(count)

    async def connection(self) -> Connection:
        """Return the connection for the next request of a task.

        Raises:
            BrokenError: No connection can be made.
        """
        while True:
            # One connection is enough for tasks, whose replies one thread receives anyway.
            connection = None if self.is_closed else self._links[0].ready
            if connection is not None:
                return connection
            link = self._choose()
            connection = link.ready
            if connection is not None:
                return connection
            try:
                return await trio.to_thread.run_sync(
                    partial(link.connect, time.monotonic()),
                    abandon_on_cancel=True,
                    limiter=self._threads,
                )
            except BrokenError:
                if not self._can_rest(link):
                    raise

    def connection_blocking(self) -> Connection:
        """Return the connection for the next request of a thread.

        Raises:
            BrokenError: No connection can be made.
        """
        while True:
            link = self._choose()
            connection = link.ready
            if connection is not None:
                return connection
            try:
                return link.connect(time.monotonic())
            except BrokenError:
                if not self._can_rest(link):
                    raise

    def close(self) -> None:
        """Close all connections, and make no more."""
        self.is_closed = True
        for link in self._links:
            link.close()

    def _choose(self) -> Link:
        """Return the link with the fewest requests; of equal ones, the first.

        Raises:
            BrokenError: The file was closed.
        """
        if self.is_closed:
            msg = "closed"
            raise BrokenError(msg)
        now = time.monotonic()
        links = [link for link in self._links if link.ready or link.rests_until <= now]
        return min(links or self._links, key=_load)

    def _can_rest(self, link: Link) -> bool:
        """Let a link in which no connection can be made rest, if another one works.

        Returns whether that is so.  A server may allow fewer connections than this.
        """
        if not any(other.ready for other in self._links):
            return False
        link.rests_until = time.monotonic() + _REST_SECONDS
        return True


def _load(link: Link) -> int:
    return link.in_flight
