"""Fetching units of an object, when readers need them and ahead of sequential readers.

A unit is 256 KiB of the object.  Adjacent units that are fetched together form a *flight*, for
which any number of readers can wait.  Threads look up the units in the cache, and then fetch those
that are missing.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from qedfuse.errors import RemoteError
from qedfuse.remote.fetchthreads import FetchThreads
from qedfuse.remote.flight import Flight
from qedfuse.remote.flightloader import FlightLoader
from qedfuse.remote.outagelog import closed_error
from qedfuse.remote.readahead import ReadAhead
from qedfuse.remote.recentfailures import RecentFailures
from qedfuse.remote.unitfile import units_of
from qedfuse.remote.unitstore import UnitStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qedfuse.errors import HostError
    from qedfuse.remote.object import RemoteObject
    from qedfuse.remote.unitfile import UnitFile


_MAX_FLIGHT_UNITS: Final = 4
"""Maximum number of units in one flight: 1 MiB."""
_MAX_REQUEST_FLIGHTS: Final = 4
"""Maximum number of flights in one request: 4 MiB."""
_MIN_LONG_WINDOW_UNITS: Final = 64
"""A request may have several flights if at least this number of units is fetched ahead."""
_MAX_WINDOW_UNITS: Final = 64
"""Maximum number of units that are fetched ahead of a sequential reader: 16 MiB."""
_MAX_HELD_WINDOW_UNITS: Final = 8
"""The same if units cannot be stored in the cache: 2 MiB, so that the units of several readers fit
into memory (`UnitStore.hold`)."""


class Fetcher:
    """Fetches units of one version of an object, and stores them in the cache if there is one.

    Threads and tasks may use a fetcher concurrently.

    Attributes:
        ready: See `UnitStore.ready`.
        zeros: See `UnitStore.zeros`.
        silence: See `FlightLoader`.
    """

    def __init__(
        self,
        source: RemoteObject,
        cache: UnitFile | None,
        evict: Callable[[UnitFile], int] | None = None,
    ) -> None:
        """Make a fetcher for the object ``source``; no thread is started yet.

        Args:
            source: The object, which the fetcher closes.
            cache: Where units are stored, which the fetcher closes; None to store no units.
            evict: Keeps the cache within its limits; see `UnitStore`.
        """
        self._source = source
        self._name = source.address.shown
        self._units = units_of(source.version.size)
        self._store = UnitStore(self._units, cache, evict)
        self.ready = self._store.ready
        self.zeros = self._store.zeros
        self._failures = RecentFailures()
        self._loader = FlightLoader(source, self._store, self._finish)
        self.silence = self._loader.silence
        self._threads = FetchThreads(
            *(self._name, self._look_up, self._loader.fetch, self._finish),
            self._loader.clear_buffers,
        )
        self._lock = self._threads.lock
        # The lock protects the following attributes.
        self._flights: dict[int, Flight] = {}  # the flight of each unit that has one
        self._wanted: set[Flight] = set()  # flights that a reader has demanded
        self._last_wanted = -math.inf  # time.monotonic() when a flight in `_wanted` has last ended
        self._readers = ReadAhead()
        # A marker is a unit whose read starts the next fetch ahead (`ReadAhead.set_marker`).
        self._markers: set[int] = set()  # markers that are being fetched
        self._held_back: set[int] = set()  # markers whose fetch has ended, and that are not ready

    def demand(self, first: int, last: int) -> list[Flight]:
        """Start fetching the units ``first`` to ``last`` that are not ready; return their flights.

        The caller must wait for the flights, and then `release` them, also if the wait fails or is
        cancelled.  When they have ended without an error, each unit is in the blocks of its flight,
        or is ready.

        Raises:
            RemoteError: The fetcher is closed.
        """
        with self._lock:
            flights = self._begin(first, last, is_wanted=True)
            self._fetch_ahead(first, last)
        return flights

    def release(self, flights: Iterable[Flight]) -> None:
        """Record that a reader waits no longer for flights that `demand` has returned.

        A flight that no thread has taken, and for which no other reader waits, is dropped.  If it
        was a prefetch before a reader demanded it, it becomes one again.  Otherwise the fetches of
        readers that have given up would delay those of other readers, and be made when the server
        answers again.
        """
        with self._lock:
            for flight in flights:
                flight.readers -= 1
                if not flight.readers and self._threads.withdraw(flight):
                    self._drop(flight)

    def prefetch(self, first: int, last: int) -> list[Flight]:
        """Start fetching adjacent units that no reader waits for; return their flights.

        At most 4 such fetches run at a time.

        Raises:
            RemoteError: The fetcher is closed.
        """
        with self._lock:
            return self._begin(first, last, is_wanted=False)

    @property
    def fetched_bytes(self) -> int:
        """Number of bytes of the object that the server has sent."""
        return self._loader.fetched_bytes

    @property
    def requests(self) -> int:
        """See `FlightLoader.requests`."""
        return self._loader.requests

    @property
    def awaited_requests(self) -> int:
        """See `FlightLoader.awaited_requests`."""
        return self._loader.awaited_requests

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._threads.is_closed

    def quiet_seconds(self) -> float:
        """Return the seconds since a unit was last fetched for a reader; infinite if never.

        The result is 0 while a flight that a reader has demanded is not released or still fetched.
        """
        with self._lock:
            return 0.0 if self._wanted else time.monotonic() - self._last_wanted

    def record_read(self, first: int, last: int) -> None:
        """Record a read of ready units; start fetching what a sequential reader will read next."""
        with self._lock:
            if not self._threads.is_closed:
                self._fetch_ahead(first, last)

    def is_stored(self, first: int, last: int) -> bool:
        """Return whether the cache claims to have all units ``first`` to ``last``."""
        return self._store.is_stored(first, last)

    def mark_usable_offline(self, needed: bytes) -> bool:
        """Record that the cache has all needed units; return whether it was recorded.

        Afterwards the object can be opened while no server answers.  ``needed`` has a byte for each
        unit: 1 if readers need the unit, and 0 if they do not.
        """
        return self._store.mark_usable_offline(needed)

    @property
    def has_cache(self) -> bool:
        """Whether there is an entry of the cache, even if the cache is full."""
        return self._store.has_cache

    @property
    def is_evicting(self) -> bool:
        """Whether entries of the cache are being removed; then `store_held` may succeed soon."""
        return self._store.is_evicting

    def store_held(self, first: int, last: int) -> bool:
        """Store units that the cache refused before; return whether it now claims to have them."""
        return self._store.store_held(first, last)

    def forget(self, first: int, last: int) -> None:
        """Make adjacent units not ready after a miss of the page cache; see `UnitStore.forget`."""
        self._store.forget(first, last)

    def discard_cache(self) -> None:
        """Stop using the entry of the cache, because its data file was truncated."""
        self._store.discard()

    def close(self) -> None:
        """End the threads, and end all flights with an error; a second call does nothing.

        A thread that is fetching ends after its running request; this call does not wait for it.
        """
        with self._lock:
            self._threads.close()
            flights = set(self._flights.values())
            self._flights.clear()
            self._wanted.clear()
        self._loader.close()
        for flight in flights:
            flight.end(closed_error(self._name))
        self._store.close()

    def _begin(
        self, first: int, last: int, *, is_wanted: bool, is_long: bool = False
    ) -> list[Flight]:
        """Return the flights of the units that are not ready; start the flights that are missing.

        A unit that is held in memory gets a flight that has already ended.  The caller holds the
        lock.  ``is_long`` allows one request to fetch several of the flights.

        Raises:
            RemoteError: The fetcher is closed.
        """
        if self._threads.is_closed:
            raise closed_error(self._name)
        found: list[Flight] = []
        unit = first
        while unit <= last:
            if self.ready[unit]:
                unit += 1
                continue
            flight = self._flights.get(unit)
            if flight is None and (held := self._store.held(unit)) is not None:
                flight = self._make_flight(unit, unit)
                flight.blocks[unit] = held
                flight.end()
            elif flight is None:
                continues = is_long and len(found) % _MAX_REQUEST_FLIGHTS > 0
                flight = self._new_flight(unit, last, continues=continues)
                if is_wanted:
                    self._want(flight)
                    self._threads.add_lookup(flight)
                else:
                    self._threads.add_prefetch(flight)
            elif is_wanted and not flight.readers:
                self._want(flight)
                flight.joined_late = not self._threads.promote(flight)
            flight.readers += is_wanted
            flight.is_prefetched |= not is_wanted
            found.append(flight)
            unit = flight.last + 1
        return found

    def _want(self, flight: Flight) -> None:
        """Record that a reader waits for a flight."""
        flight.is_wanted = True
        self._wanted.add(flight)

    def _drop(self, flight: Flight) -> None:
        """End a flight that no reader waits for, or make it a prefetch again if it was one.

        The caller has taken the flight out of the queues, and holds the lock.
        """
        if flight.is_prefetched:
            flight.is_wanted = False
            self._wanted.discard(flight)
            self._threads.add_prefetch(flight)
        else:
            self._end(flight)
            flight.end(RemoteError(f"{self._name}: found no reader, expected one"))

    def _new_flight(self, first: int, last: int, *, continues: bool) -> Flight:
        """Return a new flight of the unit ``first`` and the units after it that need a flight."""
        end = first + 1
        while (
            end <= last
            and end - first < _MAX_FLIGHT_UNITS
            and not self.ready[end]
            and end not in self._flights
            and self._store.held(end) is None
        ):
            end += 1
        flight = self._make_flight(first, end - 1, continues=continues)
        self._flights.update(dict.fromkeys(range(first, end), flight))
        self._held_back.difference_update(range(first, end))
        return flight

    def _make_flight(self, first: int, last: int, *, continues: bool = False) -> Flight:
        """Return a flight, with a shorter time limit if a recent fetch of its units has failed."""
        source = self._source
        return Flight(
            *(first, last, self._name, source.max_seconds, source.max_brief_seconds),
            self._threads.ensure_thread,
            continues=continues,
            is_brief=self._failures.has_any(first, last),
        )

    def _fetch_ahead(self, first: int, last: int) -> None:
        """If the reader is sequential, start fetching what it will read next."""
        max_units = _MAX_WINDOW_UNITS if self._store.can_store else _MAX_HELD_WINDOW_UNITS
        window = self._readers.record_read(first, last, max_units)
        end = min(last + window, self._units - 1)
        ahead = last + 1
        # The fetch of a marker in `_held_back` has ended as well, although it is not ready.
        while ahead <= end and (
            self.ready[ahead] or ahead in self._flights or ahead in self._held_back
        ):
            ahead += 1
        # Fetching starts when half of the window is used up, so that the requests are long.
        if ahead <= end and ahead - last <= 1 + window // 2:
            self._markers.add(self._readers.set_marker(ahead, end))
            self._begin(ahead, end, is_wanted=False, is_long=window >= _MIN_LONG_WINDOW_UNITS)

    def _look_up(self, flight: Flight) -> None:
        """Look up the units of a flight in the cache; queue the flight if a unit is missing."""
        if not self._loader.missing(flight):
            self._finish(flight)
            return
        with self._lock:
            if flight.readers:
                self._threads.add_fetch(flight)
            elif not self._threads.is_closed:
                self._drop(flight)

    def _finish(self, flight: Flight, error: HostError | None = None) -> None:
        """End a flight, unless its fetch has failed and must be made again for a late reader."""
        with self._lock:
            must_repeat = error is not None and flight.joined_late and flight.readers > 0
            flight.joined_late = False
            if must_repeat and not self._threads.is_closed:
                self._threads.add_fetch(flight)
                return
            self._end(flight, error)
        flight.end(error)

    def _end(self, flight: Flight, error: HostError | None = None) -> None:
        """Remove a flight that ends from the attributes of the fetcher; the caller holds the lock.

        Its markers become not ready if no reader has waited (`ReadAhead.set_marker`).
        """
        for unit in range(flight.first, flight.last + 1):
            if self._flights.get(unit) is flight:
                del self._flights[unit]
            if unit in self._markers:
                self._markers.remove(unit)
                if not flight.is_wanted:
                    self.ready[unit] = 0
                    self._held_back.add(unit)
        if flight in self._wanted:
            self._wanted.remove(flight)
            if error is not None:
                self._failures.record(flight.first, flight.last)
            self._last_wanted = time.monotonic()
