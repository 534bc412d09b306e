"""The connections to one export, which are made on demand, and replaced after they broke."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.nbd.failures import BrokenError
from qedfuse.nbd.waiters import CANCEL_POLL_SECONDS, NO_CONNECTION, check_wanted
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.nbd.connection import Connection

MAX_CONNECTIONS: Final = 4
"""Maximum number of connections to one export."""
_BACKOFF_SECONDS: Final = 60.0
"""Time for which a slot is avoided after a failure to connect."""


class Slot:
    """A slot for one connection of a pool.  Threads and tasks may use the slot concurrently.

    Attributes:
        backoff_until: The time (`time.monotonic`) until which other slots are preferred.
    """

    def __init__(
        self,
        make: Callable[[float], Connection],
        connection: Connection | None,
        closed: threading.Event,
    ) -> None:
        """Begin with ``connection``; None for a slot without a connection.

        Args:
            make: Function that makes a connection and blocks the thread.  Its argument is the time
                (`time.monotonic`) at which it gives up.
            connection: The first connection.
            closed: The event that is set when the pool is closed.
        """
        self._make = make
        self._closed = closed
        self._lock = threading.Lock()
        self._connection = connection
        self._failed_at = 0.0
        self._failure: BrokenError | None = None
        self.backoff_until = 0.0

    @property
    def working_connection(self) -> Connection | None:
        """The connection; None if there is none that works."""
        connection = self._connection
        return None if connection is None or connection.is_broken else connection

    @property
    def in_flight(self) -> int:
        """The number of requests without a complete reply."""
        connection = self._connection
        return 0 if connection is None else connection.in_flight

    def connect(self, since: float, end: float) -> Connection:
        """Return the connection; make one if none works.  The call blocks the thread.

        Args:
            since: The time (`time.monotonic`) at which the caller began to wait.  If the attempt of
                another caller has failed since then, this call fails with the same error.
            end: The time at which the call ends at the latest.

        Raises:
            BrokenError: No connection can be made in time, or the pool was closed.
            RefusedError: The server does not serve the export, or this client cannot use the
                export.
            QedError: An error of ``make``.
            trio.Cancelled: The calling thread is one of trio, and its task was cancelled.
        """
        check_wanted(self._closed, end)
        while not self._lock.acquire(timeout=CANCEL_POLL_SECONDS):
            check_wanted(self._closed, end)
        try:
            connection = self.working_connection
            if connection is not None:
                return connection
            if self._failure is not None and self._failed_at >= since:
                raise BrokenError(*self._failure.args)
            try:
                connection = self._make(end)
            except BrokenError as error:
                # Other callers that wait get the same error (see ``since``).  But an error after
                # the time of this caller is not stored, because they may have more time.
                now = time.monotonic()
                if now < end:
                    self._failed_at, self._failure = now, error
                raise
            self._connection, self._failure = connection, None
        finally:
            self._lock.release()
        if self._closed.is_set():
            connection.close()
        return connection

    def close(self) -> None:
        """Close the connection; the caller must set the event of the pool first.

        A thread that is making a connection sees the event, and closes the new connection.
        """
        connection = self._connection
        if connection is not None:
            connection.close()


class ConnectionPool:
    """Up to `MAX_CONNECTIONS` connections to one export.

    Attributes:
        closed: Event that is set by `close`, and ends all waiting.
    """

    def __init__(
        self, make: Callable[[float], Connection], first: Connection, closed: threading.Event
    ) -> None:
        """Begin with the connection ``first``.

        Args:
            make: Function that makes a connection.  It gives up when ``closed`` is set, and at the
                time (`time.monotonic`) that is its argument.
            first: The first connection.
            closed: Event that `close` sets.
        """
        self.closed = closed
        count = MAX_CONNECTIONS if first.export.can_multi_conn else 1
        self._slots = [Slot(make, None if index else first, closed) for index in range(count)]
        # Threads that wait for a server must not delay calls on local files.
        self._threads = trio.CapacityLimiter(count)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.closed.is_set()

    async def connection(self, end: float) -> Connection:
        """Return the connection for the next request of a task; errors as in `Slot.connect`.

        Args:
            end: The time (`time.monotonic`) at which the call ends at the latest.
        """
        while True:
            # One thread runs all tasks and receives all of their replies, so further connections
            # would not make the tasks faster.
            connection = None if self.is_closed else self._slots[0].working_connection
            if connection is not None:
                return connection
            slot = self._choose()
            connection = slot.working_connection
            if connection is not None:
                return connection
            try:
                return await self._connect_in_thread(slot, end)
            except BrokenError:
                if not self._try_back_off(slot) or time.monotonic() >= end:
                    raise

    async def _connect_in_thread(self, slot: Slot, end: float) -> Connection:
        """Call `Slot.connect` in a thread; the time limit includes the wait for a free thread."""
        with trio.move_on_after(max(0.0, end - time.monotonic())):
            return await run_in_thread(
                partial(slot.connect, time.monotonic(), end),
                abandon_on_cancel=True,
                limiter=self._threads,
            )
        raise BrokenError(NO_CONNECTION)

    def connection_blocking(self, end: float) -> Connection:
        """Return the connection for the next request of a thread; errors as in `Slot.connect`.

        Args:
            end: The time (`time.monotonic`) at which the call ends at the latest.
        """
        while True:
            slot = self._choose()
            connection = slot.working_connection
            if connection is not None:
                return connection
            try:
                return slot.connect(time.monotonic(), end)
            except BrokenError:
                # After ``end`` the request would fail on a working connection too, and break it.
                if not self._try_back_off(slot) or time.monotonic() >= end:
                    raise

    def close(self) -> None:
        """Close all connections; later calls make no new ones."""
        self.closed.set()
        for slot in self._slots:
            slot.close()

    def _choose(self) -> Slot:
        """Return the slot with the fewest requests in flight; of equal slots, the first.

        Slots without a connection are left out during their backoff time, unless this leaves out
        all slots.
        """
        if self.is_closed:
            msg = "closed"
            raise BrokenError(msg)
        now = time.monotonic()
        slots = [
            slot for slot in self._slots if slot.working_connection or slot.backoff_until <= now
        ]
        return min(slots or self._slots, key=_in_flight)

    def _try_back_off(self, slot: Slot) -> bool:
        """Start the backoff time of a slot in which no connection could be made; return True.

        If no other slot has a working connection, the server probably cannot be reached.  Then this
        method changes nothing and returns False.
        """
        if not any(other.working_connection for other in self._slots):
            return False
        slot.backoff_until = time.monotonic() + _BACKOFF_SECONDS
        return True


def _in_flight(slot: Slot) -> int:
    return slot.in_flight
