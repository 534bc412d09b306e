"""A flight: the fetch of adjacent units (`UNIT_BYTES`), for which any number of readers wait."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, RemoteError
from qedfuse.util.loopload import loop_load

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer

_POLL_SECONDS: Final = 0.2
"""Interval at which a waiting thread checks whether its task was cancelled.  If the host could not
start a thread that fetches, a waiting reader tries again at this interval."""


class Flight:
    """The fetch of some adjacent units, for which any number of readers wait.

    Attributes:
        first: The first unit.
        last: The last unit.
        blocks: The content of each unit that was read from the cache or fetched.  After a success,
            only units that are ready for reads from the page cache (`UnitStore.ready`) can be
            missing.
        is_wanted: Whether a reader waits for the flight, or has waited for it.  A prefetch whose
            readers have all left is not wanted any more.
        readers: Number of readers that have demanded the flight and not released it.
        is_prefetched: Whether the flight must be fetched even if no reader waits for it.
        is_missing: Whether a unit was not found in the cache.
        joined_late: Whether its first reader, or the first one after all others had left, came when
            a thread had already taken the flight.  If True and the fetch fails, it is made again,
            because the time limit of the failed fetch had begun before the late reader came.
        continues: Whether one request may fetch the flight together with the preceding flight.
        is_brief: Whether failed fetches are repeated for a short time only, because a reader of one
            of the units has just waited for the server without success.
    """

    def __init__(
        self,
        first: int,
        last: int,
        name: str,
        max_seconds: float,
        max_brief_seconds: float,
        ensure_thread: Callable[[], object] = lambda: None,
        *,
        continues: bool = False,
        is_brief: bool = False,
    ) -> None:
        """Describe a fetch that has not begun.

        Args:
            first: The first unit.
            last: The last unit.
            name: The name of the remote file, for messages.
            max_seconds: How long a reader waits at most, even if no thread takes the flight.
            max_brief_seconds: The same limit for a brief flight (`is_brief`).
            ensure_thread: Called every `_POLL_SECONDS` while a reader waits.
            continues: See the attribute.
            is_brief: See the attribute.
        """
        self.first = first
        self.last = last
        self.blocks: dict[int, Buffer] = {}
        self.is_wanted = self.is_prefetched = self.joined_late = self.is_missing = False
        self.readers = 0
        self.continues = continues
        self.is_brief = is_brief
        self._name = name
        self._max_seconds = max_seconds
        self._max_brief_seconds = max_brief_seconds
        self._ensure_thread = ensure_thread
        self._error: HostError | None = None
        self._ended = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def needs_server(self) -> bool:
        """Return whether the flight waits for the server: a unit was not found in the cache."""
        return self.is_missing

    def is_next_of(self, flight: Flight) -> bool:
        """Return whether one request may fetch ``flight`` and then this flight."""
        return self.continues and self.first == flight.last + 1

    def end(self, error: HostError | None = None) -> None:
        """End the flight and wake the readers; a second call does nothing."""
        with self._lock:
            if self._ended.is_set():
                return
            self._error = error
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            # The event loop of a cancelled reader may have ended.
            with suppress(trio.RunFinishedError):
                callback()

    def wait_blocking(self) -> None:
        """Block the thread until the flight has ended.

        Raises:
            HostError: The fetch failed, or did not end within the time limit of the flight.
            trio.Cancelled: The thread is one of trio, and its task was cancelled.
        """
        seconds = self._max_wait()
        end = time.monotonic() + seconds
        while not self._ended.wait(_POLL_SECONDS) and time.monotonic() < end:
            with suppress(RuntimeError):  # not a thread of trio
                trio.from_thread.check_cancelled()
            self._ensure_thread()
        self._check(seconds, in_time=self._ended.is_set())

    async def wait(self) -> None:
        """Wait in a task until the flight has ended; errors as in `wait_blocking`."""
        event = trio.Event()
        token = trio.lowlevel.current_trio_token()
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(lambda: token.run_sync_soon(event.set, idempotent=True))
            else:
                event.set()
        seconds = self._max_wait()
        load = loop_load()
        load.fetched_reads += 1
        try:
            with trio.move_on_after(seconds) as scope:
                while not event.is_set():
                    with trio.move_on_after(_POLL_SECONDS):
                        await event.wait()
                    self._ensure_thread()
        finally:
            load.fetched_reads -= 1
        self._check(seconds, in_time=not scope.cancelled_caught)

    def _max_wait(self) -> float:
        return self._max_brief_seconds if self.is_brief else self._max_seconds

    def _check(self, seconds: float, *, in_time: bool) -> None:
        if not in_time:
            # The kernel may repeat the read.  The repeated read joins this flight, and must not
            # wait as long again.
            self.is_brief = True
            msg = f"{self._name}: found no answer within {seconds:.0f} seconds"
            raise RemoteError(msg)
        if self._error is not None:
            raise self._error.again()
