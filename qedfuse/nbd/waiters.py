"""Readers that wait for replies of an NBD server: tasks of trio and threads."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import trio

from qedfuse.nbd.failures import BrokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.nbd.requests import Request

CANCEL_POLL_SECONDS: Final = 0.2
"""Interval at which waiting threads and tasks check whether they should give up."""

NO_CONNECTION: Final = "found no connection in time"
"""The message of the error if no connection could be made in time."""


class Waiter(Protocol):
    """A reader that waits for replies."""

    def wake(self) -> None:
        """Let the reader check its requests again; any thread may call the method."""


class WaitingTask:
    """A task of trio that waits for replies."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._thread = threading.get_ident()
        self._token = trio.lowlevel.current_trio_token()

    def must_wait(self, requests: Sequence[Request]) -> bool:
        """Forget earlier calls of `wake`; return whether any request is unfinished."""
        if self._event.is_set():
            self._event = trio.Event()
        return not are_done(requests)

    async def wait(self, seconds: float) -> None:
        """Wait for ``seconds``, or until `wake` is called."""
        with trio.move_on_after(seconds):
            await self._event.wait()

    def wake(self) -> None:
        """Wake the task; see `Waiter`."""
        if threading.get_ident() == self._thread:
            self._event.set()
        else:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._set)

    def _set(self) -> None:
        self._event.set()


class WaitingThread:
    """A thread that waits for replies."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.wake = self._event.set

    def must_wait(self, requests: Sequence[Request]) -> bool:
        """Forget earlier calls of `wake`; return whether any request is unfinished."""
        self._event.clear()
        return not are_done(requests)

    def wait(self, seconds: float) -> None:
        """Wait for ``seconds``, or until `wake` is called."""
        self._event.wait(seconds)


def are_done(requests: Sequence[Request]) -> bool:
    """Return whether all requests have ended: by a complete reply, or by a failure."""
    return all(request.is_done for request in requests)


def pause_blocking(closed: threading.Event, seconds: float) -> None:
    """Wait in a thread for ``seconds``, or until ``closed`` is set.

    Raises:
        trio.Cancelled: The calling thread is one of trio, and its task was cancelled.
    """
    end = time.monotonic() + seconds
    while not closed.wait(min(seconds, CANCEL_POLL_SECONDS)):
        seconds = end - time.monotonic()
        if seconds <= 0:
            return
        check_cancelled()


async def pause(closed: threading.Event, seconds: float) -> None:
    """Wait in a task for ``seconds``, or until ``closed`` is set."""
    end = time.monotonic() + seconds
    await trio.lowlevel.checkpoint()
    while not closed.is_set() and (left := end - time.monotonic()) > 0:  # noqa: ASYNC110  threads set it
        await trio.sleep(min(left, CANCEL_POLL_SECONDS))


def check_wanted(closed: threading.Event, end: float) -> None:
    """Raise an exception if a thread must not wait any longer for a connection.

    Raises:
        BrokenError: ``closed`` is set, or the time ``end`` (`time.monotonic`) has come.
        trio.Cancelled: The calling thread is one of trio, and its task was cancelled.
    """
    if closed.is_set():
        msg = "closed"
        raise BrokenError(msg)
    if time.monotonic() >= end:
        raise BrokenError(NO_CONNECTION)
    check_cancelled()


def check_cancelled() -> None:
    """Raise trio.Cancelled if the calling thread is one of trio and its task was cancelled."""
    with suppress(RuntimeError):  # not a thread of trio
        trio.from_thread.check_cancelled()
