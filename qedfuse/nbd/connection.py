"""A connection to an NBD server with many requests in flight, shared by tasks and threads.

No thread and no task belongs to the connection.  One of the readers that wait for replies is the
*leader*: it receives for all readers, and wakes each reader whose reply is complete.  When the
leader's own reply is complete, another reader becomes the leader.
"""

from __future__ import annotations

import select
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.nbd import messages
from qedfuse.nbd.failures import BrokenError
from qedfuse.nbd.replies import Replies
from qedfuse.nbd.waiters import (
    CANCEL_POLL_SECONDS,
    WaitingTask,
    WaitingThread,
    are_done,
    check_cancelled,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.nbd.handshake import Export
    from qedfuse.nbd.requests import Request
    from qedfuse.nbd.waiters import Waiter
    from qedfuse.nbd.wire import Wire

_RECEPTIONS_PER_CHECKPOINT: Final = 16
"""Number of consecutive receptions after which a leading task lets other tasks run."""


class Connection:
    """A connection after the handshake.  Threads and tasks may use it concurrently.

    Attributes:
        export: The export.
    """

    def __init__(self, wire: Wire, export: Export, idle_seconds: float) -> None:
        """Use a connection after its handshake.

        Args:
            wire: The connection, whose socket `Connection` will close.
            export: The export, as the handshake has returned it.
            idle_seconds: The connection is given up if a reply is expected and no byte comes for
                this time.
        """
        self.export = export
        self._wire = wire
        self._idle_seconds = idle_seconds
        self._replies = Replies(export.context, is_structured=export.is_structured)
        self._lock = threading.Lock()
        self._waiters: dict[Request, Waiter] = {}
        self._leader: Waiter | None = None
        self._failure: BrokenError | None = None
        self._last_received = 0.0

    @property
    def is_broken(self) -> bool:
        """Whether no request can be sent any more."""
        return self._failure is not None

    @property
    def in_flight(self) -> int:
        """The number of requests without a complete reply."""
        return len(self._replies.pending)

    async def run(self, requests: Sequence[Request], end: float) -> None:
        """Send requests, and wait in a task until all replies are complete.

        Args:
            requests: The requests.  `Request.failure` is set if the server has answered a request
                with an error.
            end: The time (`time.monotonic`) at which waiting ends.

        Raises:
            BrokenError: The connection broke, or ``end`` has passed, which breaks the connection
                for all readers.
        """
        waiter = WaitingTask()
        try:
            self._submit(requests, waiter)
            while waiter.must_wait(requests):
                if self._try_lead(waiter, requests):
                    await self._lead(requests, end)
                else:
                    await waiter.wait(self._seconds_until(end))
        finally:
            self._leave(waiter, requests)
        _raise_broken(requests)

    def run_blocking(self, requests: Sequence[Request], end: float) -> None:
        """Send requests, and wait in a thread until all replies are complete; see `run`.

        Raises:
            BrokenError: The connection broke, or ``end`` has passed.
            trio.Cancelled: The thread is one of trio, and its task was cancelled.
        """
        waiter = WaitingThread()
        try:
            self._submit(requests, waiter)
            while waiter.must_wait(requests):
                if self._try_lead(waiter, requests):
                    self._lead_blocking(requests, end)
                else:
                    waiter.wait(min(CANCEL_POLL_SECONDS, self._seconds_until(end)))
                    check_cancelled()
        finally:
            self._leave(waiter, requests)
        _raise_broken(requests)

    def close(self) -> None:
        """Close the connection; readers that wait get a `BrokenError`."""
        with self._lock, suppress(OSError):
            if self._failure is None:
                self._wire.send(messages.request(messages.CMD_DISC, 0, 0, 0))
        self._fail(BrokenError("closed"))

    def _submit(self, requests: Sequence[Request], waiter: Waiter) -> None:
        """Send requests; ``waiter`` is the reader that waits for their replies."""
        try:
            with self._lock:
                if self._failure is not None:
                    raise BrokenError(*self._failure.args)
                if not self._replies.pending:
                    self._last_received = time.monotonic()
                for request in requests:
                    self._waiters[request] = waiter
                    self._wire.send(self._replies.add(request))
        except OSError as error:
            raise self._fail(_broken(error)) from error

    def _try_lead(self, waiter: Waiter, requests: Sequence[Request]) -> bool:
        """Make ``waiter`` the leader, if there is none and ``requests`` are not complete."""
        with self._lock:
            if self._leader is not None or are_done(requests):
                return False
            self._leader = waiter
            return True

    async def _lead(self, requests: Sequence[Request], end: float) -> None:
        """Receive for all readers until ``requests`` are complete."""
        receptions = 0
        while not are_done(requests):
            if not self._receive():
                with trio.move_on_after(self._seconds_to_wait(end)):
                    await trio.lowlevel.wait_readable(self._wire.socket)
            elif (receptions := receptions + 1) % _RECEPTIONS_PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()

    def _lead_blocking(self, requests: Sequence[Request], end: float) -> None:
        """Receive in a thread for all readers until ``requests`` are complete.

        Raises:
            trio.Cancelled: The thread is one of trio, and its task was cancelled.
        """
        poll = select.poll()
        poll.register(self._wire.socket, select.POLLIN)
        while not are_done(requests):
            if not self._receive():
                seconds = min(CANCEL_POLL_SECONDS, self._seconds_to_wait(end))
                poll.poll(1 + 1000 * seconds)
                check_cancelled()

    def _receive(self) -> bool:
        """Receive bytes, and wake readers whose requests ended; return False if no bytes came.

        Returns True also after a failure, which ends all requests.
        """
        try:
            with self._lock:
                if self._failure is not None:
                    return True
                count = self._wire.receive_into(self._replies.buffer())
                if count is None:
                    return False
                if not count:
                    msg = "found the end of the connection"
                    raise BrokenError(msg)  # noqa: TRY301  handled like other failures
                self._last_received = time.monotonic()
                self._replies.advance(count)
                waiters = self._take_waiters()
        except BrokenError as error:
            self._fail(error)
            return True
        except OSError as error:
            self._fail(_broken(error))
            return True
        except BaseException:
            self._fail(BrokenError("found a bug"))
            raise
        for waiter in waiters:
            waiter.wake()
        return True

    def _take_waiters(self) -> list[Waiter]:
        """Remove and return the readers of ended requests; the caller must hold the lock."""
        done = self._replies.take_done()
        return [self._waiters.pop(request) for request in done if request in self._waiters]

    def _seconds_until(self, end: float) -> float:
        """Return how many seconds are left until ``end``.

        Raises:
            BrokenError: ``end`` has passed.  The connection is given up.
        """
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise self._fail(BrokenError("found no reply in time"))
        return seconds

    def _seconds_to_wait(self, end: float) -> float:
        """Return for how many seconds the leader waits for the next bytes.

        Raises:
            BrokenError: ``end`` has passed, or no byte has come for too long.  The connection is
                given up.
        """
        idle = self._last_received + self._idle_seconds - time.monotonic()
        if idle <= 0:
            msg = f"found no reply for {self._idle_seconds:g} seconds"
            raise self._fail(BrokenError(msg))
        return min(idle, self._seconds_until(end))

    def _fail(self, failure: BrokenError) -> BrokenError:
        """Return ``failure``; if it is the first failure, end all requests with it."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
                self._replies.fail(failure)
                with suppress(OSError):
                    self._wire.socket.shutdown(2)
            waiters = self._take_waiters()
            self._close_if_unused()
        for waiter in waiters:
            waiter.wake()
        return failure

    def _leave(self, waiter: Waiter, requests: Sequence[Request]) -> None:
        """End the waiting of a reader, and let another reader lead.

        After the call no byte is written to the buffers of the requests.
        """
        next_leader = None
        with self._lock:
            for request in requests:
                self._waiters.pop(request, None)
                request.abandon()
            if self._leader is waiter:
                self._leader = None
            if self._leader is None:
                next_leader = next(iter(self._waiters.values()), None)
            self._close_if_unused()
        if next_leader is not None:
            next_leader.wake()

    def _close_if_unused(self) -> None:
        """Close the socket if the connection is broken and has no leader; the lock must be held."""
        if self._failure is not None and self._leader is None:
            self._wire.socket.close()


def _broken(error: OSError) -> BrokenError:
    """Return the failure for an error of a socket."""
    return BrokenError(error.strerror or str(error))


def _raise_broken(requests: Sequence[Request]) -> None:
    """Raise a copy of the `BrokenError` of a request, if the connection broke before its reply."""
    for request in requests:
        if isinstance(request.failure, BrokenError):
            raise type(request.failure)(*request.failure.args)
