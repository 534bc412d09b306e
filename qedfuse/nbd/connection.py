"""A connection to an NBD server with many requests in flight, for tasks and threads together.

No thread and no task belongs to the connection.  Of the readers that wait for replies, one is the
*leader*: it receives for all, and wakes each reader whose reply is complete.  When its own reply is
complete, another reader becomes the leader.
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

_MAX_STEPS: Final = 16
"""Number of receptions in a row after which a leading task lets other tasks run."""


class Connection:
    """A connection after the handshake.  Threads and tasks may use it concurrently.

    Attributes:
        export: The export.
    """

    def __init__(self, wire: Wire, export: Export, idle_seconds: float) -> None:
        """Use a connection.

        Args:
            wire: The connection, which this object closes.
            export: What the handshake has returned.
            idle_seconds: Maximum time in which nothing comes while a reply is expected.
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
        """How many replies are expected."""
        return len(self._replies.pending)

    async def run(self, requests: Sequence[Request], end: float) -> None:
        """Send requests, and wait in a task until all replies are complete.

        Args:
            requests: The requests; afterwards each has its failure, if it has one.
            end: The time (`time.monotonic`) at which waiting ends.

        Raises:
            BrokenError: The connection broke, or the time is over.
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
            BrokenError: The connection broke, or the time is over.
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
        """Send requests for which a reader waits.

        Raises:
            BrokenError: The connection broke.
        """
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
        """Become the leader, unless there is one or all replies are complete."""
        with self._lock:
            if self._leader is not None or are_done(requests):
                return False
            self._leader = waiter
            return True

    async def _lead(self, requests: Sequence[Request], end: float) -> None:
        """Receive for all readers until some requests are complete."""
        steps = 0
        while not are_done(requests):
            if not self._receive():
                with trio.move_on_after(self._seconds_to_wait(end)):
                    await trio.lowlevel.wait_readable(self._wire.socket)
            elif (steps := steps + 1) % _MAX_STEPS == 0:
                await trio.lowlevel.checkpoint()

    def _lead_blocking(self, requests: Sequence[Request], end: float) -> None:
        """Receive in a thread for all readers until some requests are complete."""
        poll = select.poll()
        poll.register(self._wire.socket, select.POLLIN)
        while not are_done(requests):
            if not self._receive():
                seconds = min(CANCEL_POLL_SECONDS, self._seconds_to_wait(end))
                poll.poll(1 + 1000 * seconds)
                check_cancelled()

    def _receive(self) -> bool:
        """Receive what has come, and wake readers; return False if nothing has come."""
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
        """Return the readers whose requests have ended; the caller holds the lock."""
        done = self._replies.take_done()
        return [self._waiters.pop(request) for request in done if request in self._waiters]

    def _seconds_until(self, end: float) -> float:
        """Return how long a reader may still wait.

        Raises:
            BrokenError: The time is over.
        """
        seconds = end - time.monotonic()
        if seconds <= 0:
            # The server may never answer, and the reply would be expected for ever.
            raise self._fail(BrokenError("found no reply in time"))
        return seconds

    def _seconds_to_wait(self, end: float) -> float:
        """Return how long the leader may wait for the next bytes.

        Raises:
            BrokenError: The time is over, or nothing has come for too long.
        """
        idle = self._last_received + self._idle_seconds - time.monotonic()
        if idle <= 0:
            msg = f"found no reply for {self._idle_seconds:g} seconds"
            raise self._fail(BrokenError(msg))
        return min(idle, self._seconds_until(end))

    def _fail(self, failure: BrokenError) -> BrokenError:
        """End all requests with a failure, unless there was one; return the failure."""
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
        """Wait no more: what still comes is dropped, and another reader leads.

        After the call nothing is written to the buffers of the requests.
        """
        following = None
        with self._lock:
            for request in requests:
                self._waiters.pop(request, None)
                request.abandon()
            if self._leader is waiter:
                self._leader = None
            if self._leader is None:
                following = next(iter(self._waiters.values()), None)
            self._close_if_unused()
        if following is not None:
            following.wake()

    def _close_if_unused(self) -> None:
        """Close the socket of a broken connection that no leader waits for; the lock is held."""
        if self._failure is not None and self._leader is None:
            self._wire.socket.close()


def _broken(error: OSError) -> BrokenError:
    """Return the failure for an error of a socket."""
    return BrokenError(error.strerror or str(error))


def _raise_broken(requests: Sequence[Request]) -> None:
    """Raise the failure of the connection, if requests have one."""
    for request in requests:
        if isinstance(request.failure, BrokenError):
            raise type(request.failure)(*request.failure.args)
