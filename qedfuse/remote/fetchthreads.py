"""The threads that fetch units of remote files, and the queues of their work.

They are separate from trio's threads, whose number is limited, so a slow server does not delay
reads of local files.  At most `_MAX_FETCH_THREADS` of them fetch at a time.  The others can look up
units in the cache, so cached units can be read even while the server does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from qedfuse.errors import RemoteError
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.errors import HostError
    from qedfuse.remote.flight import Flight

_log = logging.getLogger(__name__)

_MAX_FETCH_THREADS: Final = 16
"""Maximum number of threads that fetch at a time."""
_LOOKUP_THREADS: Final = 4
"""Number of further threads, which are left to look up units in the cache."""
_MAX_PREFETCHES: Final = 4
"""Maximum number of prefetches (fetches that no reader waits for) that run at a time."""
_IDLE_SECONDS = 10.0
"""A thread that has been idle for this time ends."""


_Step: TypeAlias = "tuple[Callable[[], None], deque[Flight], int, int]"
"""The arguments of `FetchThreads._run`."""


class FetchThreads:
    """Runs the steps of flights (`Flight`): cache lookups, fetches for readers, and prefetches.

    Attributes:
        lock: Protects this object and attributes of its owner.  It is reentrant, and not held while
            a step runs.
        is_closed: Whether `close` was called.
    """

    def __init__(
        self,
        name: str,
        look_up: Callable[[Flight], None],
        fetch: Callable[[deque[Flight]], None],
        fail: Callable[[Flight, HostError], None],
        become_idle: Callable[[], object],
    ) -> None:
        """Begin without threads and with empty queues.

        Args:
            name: The name of the object for messages.
            look_up: Looks for the units of a flight in the cache; then ends the flight if all are
                there, or queues it with `add_fetch`.
            fetch: Fetches the units of adjacent flights, and removes each flight that it ends from
                the deque that it gets.
            fail: Ends a flight with an error, unless it has ended; called if a step raises.
            become_idle: Called by the last thread before it ends, with ``lock`` held.
        """
        self.lock = threading.Condition()
        self.is_closed = False
        self._name = name
        self._look_up = look_up
        self._fetch = fetch
        self._fail = fail
        self._become_idle = become_idle
        self._lookups: deque[Flight] = deque()
        self._fetches: deque[Flight] = deque()
        self._prefetches: deque[Flight] = deque()
        self._is_failure_logged = False  # whether the failure to start a thread was logged
        self._threads = self._idle = self._fetching = self._prefetching = 0

    def add_lookup(self, flight: Flight) -> None:
        """Queue a flight that a reader waits for, to look up its units in the cache."""
        with self.lock:
            self._lookups.append(flight)
            self._start_thread()

    def add_fetch(self, flight: Flight) -> None:
        """Queue a flight that a reader waits for, to fetch its units."""
        with self.lock:
            if not self.is_closed:
                self._fetches.append(flight)
                self._start_thread()

    def add_prefetch(self, flight: Flight) -> None:
        """Queue a flight that no reader waits for, to look up and fetch its units."""
        with self.lock:
            self._prefetches.append(flight)
            # The thread that takes a flight also takes the flights that continue it.
            if not flight.continues:
                self._start_thread()

    def promote(self, flight: Flight) -> bool:
        """Move a flight from the prefetches to the lookups; return False if it is not there."""
        with self.lock:
            try:
                self._prefetches.remove(flight)
            except ValueError:
                return False
            self.add_lookup(flight)
            return True

    def withdraw(self, flight: Flight) -> bool:
        """Remove a flight from the lookups or fetches; return False if it is in neither queue."""
        with self.lock:
            for queue in (self._lookups, self._fetches):
                with suppress(ValueError):
                    queue.remove(flight)
                    return True
            return False

    def ensure_thread(self) -> None:
        """Wake or start a thread if flights are queued, in case an earlier start has failed."""
        with self.lock:
            if self._lookups or self._fetches or self._prefetches:
                self._start_thread()

    def close(self) -> None:
        """Empty the queues, and let each thread end after its step."""
        with self.lock:
            self.is_closed = True
            for queue in (self._lookups, self._fetches, self._prefetches):
                queue.clear()
            self.lock.notify_all()

    def _start_thread(self) -> None:
        """Wake or start a thread for a flight that was queued; the caller holds the lock.

        If that fails, the flight stays queued, and `ensure_thread` tries again.
        """
        self.lock.notify()
        queued = len(self._lookups) + len(self._fetches) + len(self._prefetches)
        if queued <= self._idle or self._threads >= _MAX_FETCH_THREADS + _LOOKUP_THREADS:
            return
        self._threads += 1
        try:
            start_thread(self._work, name="qedfuse-fetch")
        except OSError as error:
            self._threads -= 1
            if not self._threads and not self._is_failure_logged:
                self._is_failure_logged = True
                _log.warning("%s: %s; trying again", self._name, error.strerror)
        else:
            self._is_failure_logged = False

    def _work(self) -> None:
        """Run steps until `close`, or until none has come for `_IDLE_SECONDS`."""
        while True:
            with self.lock:
                step = self._wait_for_step()
                if step is None:
                    self._threads -= 1
                    if not self._threads:
                        self._become_idle()
                    return
            self._run(*step)
            del step  # while the thread is idle, it must not keep the content of units

    def _wait_for_step(self) -> _Step | None:
        """Return the next step; None if the thread must end.  The caller holds the lock."""
        step = self._next()
        while step is None:
            if self.is_closed:
                return None
            self._idle += 1
            woken = self.lock.wait(_IDLE_SECONDS)
            self._idle -= 1
            step = self._next()
            if step is None and not woken:
                return None
        return step

    def _next(self) -> _Step | None:
        """Take a step out of the queues, and count it; None if no step can run now."""
        if self._lookups:
            flight = self._lookups.popleft()
            return partial(self._look_up, flight), deque([flight]), 0, 0
        if self._fetching >= _MAX_FETCH_THREADS:
            return None
        if self._fetches:
            self._fetching += 1
            flights = deque([self._fetches.popleft()])
            return partial(self._fetch, flights), flights, 1, 0
        if self._prefetches and self._prefetching < _MAX_PREFETCHES:
            self._fetching += 1
            self._prefetching += 1
            flights = deque([self._prefetches.popleft()])
            while self._prefetches and self._prefetches[0].is_next_of(flights[-1]):
                flights.append(self._prefetches.popleft())
            return partial(self._fetch, flights), flights, 1, 1
        return None

    def _run(
        self,
        step: Callable[[], None],
        flights: deque[Flight],
        fetching: int,
        prefetching: int,
    ) -> None:
        """Run one step; if it raises any exception, let its flights that have not ended fail.

        ``fetching`` is 1 if the step fetches for a reader, and ``prefetching`` is 1 if it fetches
        in advance; otherwise they are 0.
        """
        try:
            step()
        except BaseException as failure:  # noqa: BLE001  see above
            _log.exception("%s: cannot be fetched", self._name)
            for flight in flights:
                self._fail(flight, RemoteError(f"{self._name}: {type(failure).__name__}"))
        finally:
            with self.lock:
                self._fetching -= fetching
                self._prefetching -= prefetching
                if self._fetches or self._prefetches:
                    self._start_thread()
