"""Fetching the units of an object: each once, neighbours together, ahead of sequential readers.

Threads of its own fetch, so a slow server takes no thread from reads of local files, and nothing
waits for a thread that waits for the server.  A unit is looked for in the cache first.  These looks
have threads that no fetch may use, so cached units can be read while the server does not answer.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, RemoteError
from qedfuse.remote.unitfile import UNIT_BYTES, units_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.object import RemoteObject
    from qedfuse.remote.unitfile import UnitFile

_log = logging.getLogger(__name__)

_MAX_FETCHING_THREADS: Final = 16
_LOOKING_THREADS: Final = 4
_MAX_PREFETCHES: Final = 4
"""Maximum number of requests to the server that no reader waits for yet."""
_MAX_REQUEST_UNITS: Final = 4
"""Maximum number of units in one request: 1 MiB."""
_MIN_WINDOW_UNITS: Final = 1
_MAX_WINDOW_UNITS: Final = 32
"""How many units are fetched ahead of a sequential reader: at first, and at most (8 MiB)."""
_MAX_STREAMS: Final = 8
"""Maximum number of sequential readers that are distinguished."""
_MAX_HELD_BYTES: Final = 16 << 20
"""Maximum memory for units that could not be stored in the cache, and that no reader waits for."""
_MAX_UNCHECKED_BYTES: Final = 64 << 20
"""How many bytes are stored in the cache before its limits are looked at again."""
_IDLE_SECONDS: Final = 10.0
"""A thread ends when it has had nothing to do for this long."""


class Flight:
    """The fetch of some adjacent units, on which any number of readers wait.

    Attributes:
        first: The first unit.
        last: The last unit.
        blocks: The content of the units that could not be stored in the cache; filled at the end.
    """

    def __init__(self, first: int, last: int, max_seconds: float) -> None:
        """Describe a fetch that has not begun.

        Readers wait at most ``max_seconds``.  A server that sends its answer byte by byte could
        keep a thread for longer.
        """
        self.first = first
        self.last = last
        self.blocks: dict[int, Buffer] = {}
        self.is_wanted = False  # whether a reader waits for it
        self._max_seconds = max_seconds
        self._error: HostError | None = None
        self._ended = threading.Event()
        self._callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def end(self, error: HostError | None = None) -> None:
        """Wake all who wait."""
        with self._lock:
            self._error = error
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            # The event loop of a reader that has gone may have ended.
            with suppress(trio.RunFinishedError):
                callback()

    def wait_blocking(self) -> None:
        """Wait in a thread until the fetch has ended.

        Raises:
            HostError: The fetch failed.
        """
        self._check(in_time=self._ended.wait(self._max_seconds))

    async def wait(self) -> None:
        """Wait in a task until the fetch has ended.

        Raises:
            HostError: The fetch failed.
        """
        event = trio.Event()
        token = trio.lowlevel.current_trio_token()
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(lambda: token.run_sync_soon(event.set, idempotent=True))
            else:
                event.set()
        with trio.move_on_after(self._max_seconds) as scope:
            await event.wait()
        self._check(in_time=not scope.cancelled_caught)

    def _check(self, *, in_time: bool) -> None:
        if not in_time:
            msg = f"found no answer of the server within {self._max_seconds:.0f} seconds"
            raise RemoteError(msg)
        if self._error is not None:
            raise self._error.again()


class Fetcher:
    """Fetches units of one version of an object, into the cache if there is one.

    Threads and tasks may use a fetcher concurrently.

    Attributes:
        ready: For each unit 1 if its content is in the cache's file and was compared with its
            checksum, otherwise 0.  The object is never replaced.
        fetched_bytes: How many bytes the server has sent.
        requests: How many requests the server has answered with a range.
    """

    def __init__(
        self,
        source: RemoteObject,
        cache: UnitFile | None,
        make_room: Callable[[], None] | None = None,
    ) -> None:
        """Fetch from ``source``; no thread is started yet.

        Args:
            source: The object, which the fetcher closes.
            cache: Where units are kept, which the fetcher closes; None for no place.
            make_room: Called in a thread each time that much was stored; keeps the cache within
                its limits.
        """
        self._source = source
        self._cache = cache
        self._make_room = make_room
        self._stored_bytes = 0  # since `make_room` was called
        self._size = source.version.size
        self._units = units_of(self._size)
        self._max_seconds = source.max_seconds
        self.ready = bytearray(self._units)
        self.fetched_bytes = 0
        self.requests = 0
        self._condition = threading.Condition()
        # All that follows is protected by the lock of the condition.
        self._flights: dict[int, Flight] = {}
        self._looks: deque[Flight] = deque()
        self._fetches: deque[Flight] = deque()
        self._ahead: deque[Flight] = deque()
        self._held: OrderedDict[int, Buffer] = OrderedDict()
        self._streams: OrderedDict[int, int] = OrderedDict()
        self._threads = self._idle = self._fetching = self._prefetching = 0
        self._is_closed = False
        self._is_out = False  # whether the server did not answer the last request
        self._cannot_store = False

    def demand(self, first: int, last: int) -> list[Flight]:
        """Start fetching those of some adjacent units that are not ready; return their flights.

        The caller must wait for the flights, and then finds each unit in the blocks of its flight,
        or ready in the cache.  What a sequential reader will read next is fetched as well.
        """
        with self._condition:
            flights = self._begin(first, last, is_wanted=True)
            self._fetch_ahead(first, last)
        return flights

    def prefetch(self, first: int, last: int) -> list[Flight]:
        """Start fetching units that no reader waits for; return their flights.

        Such a fetch begins only while few others like it are running.
        """
        with self._condition:
            return self._begin(first, last, is_wanted=False)

    def discard_cache(self) -> None:
        """Stop using the cache's file, because it has lost bytes that were in it."""
        with self._condition:
            cache, self._cache = self._cache, None
            self.ready[:] = bytes(self._units)
        if cache is not None:
            _log.warning("%s: the cache was damaged; going on without it", cache.path)
            cache.close()

    def close(self) -> None:
        """End the threads, and all flights with an error; a second call does nothing.

        Threads that wait for the server are not waited for: each ends at its deadline.
        """
        with self._condition:
            self._is_closed = True
            flights = set(self._flights.values())
            for queue in (self._flights, self._looks, self._fetches, self._ahead):
                queue.clear()
            self._condition.notify_all()
        self._source.close()
        if self._cache is not None:
            self._cache.close()
        for flight in flights:
            flight.end(RemoteError(f"{self._source.address.shown}: closed"))

    def _begin(self, first: int, last: int, *, is_wanted: bool) -> list[Flight]:
        """Return the flights of the units that are not ready, new ones for those without."""
        found: list[Flight] = []
        unit = first
        while unit <= last:
            if self.ready[unit]:
                unit += 1
                continue
            flight = self._flights.get(unit)
            if flight is None and (held := self._held.get(unit)) is not None:
                self._held.move_to_end(unit)
                flight = Flight(unit, unit, self._max_seconds)
                flight.blocks[unit] = held
                flight.end()
            elif flight is None:
                flight = self._new_flight(unit, last)
                (self._looks if is_wanted else self._ahead).append(flight)
                self._need_thread()
            if is_wanted and not flight.is_wanted:
                flight.is_wanted = True
                self._promote(flight)
            found.append(flight)
            unit = flight.last + 1
        return found

    def _new_flight(self, first: int, last: int) -> Flight:
        """Return a new flight of adjacent units that are neither ready nor in a flight."""
        end = first + 1
        while (
            end <= last
            and end - first < _MAX_REQUEST_UNITS
            and not self.ready[end]
            and end not in self._flights
            and end not in self._held
        ):
            end += 1
        flight = Flight(first, end - 1, self._max_seconds)
        self._flights.update(dict.fromkeys(range(first, end), flight))
        return flight

    def _promote(self, flight: Flight) -> None:
        """Put a flight that has not begun before those that no reader waits for."""
        with suppress(ValueError):
            self._ahead.remove(flight)
            self._looks.append(flight)
            self._need_thread()

    def _fetch_ahead(self, first: int, last: int) -> None:
        """Start fetching what a sequential reader will read next.

        A read is sequential if it begins in the unit where another has ended, or in the next one.
        The window of a sequential reader grows with each unit.
        """
        window = self._streams.pop(first, None)
        is_next = window is None or last > first
        if window is None:
            window = self._streams.pop(first - 1, None)
        is_sequential = window is not None
        window = window or 0
        if is_sequential and is_next:
            window = min(max(2 * window, _MIN_WINDOW_UNITS), _MAX_WINDOW_UNITS)
        self._streams[last] = window
        if len(self._streams) > _MAX_STREAMS:
            self._streams.popitem(last=False)
        end = min(last + window, self._units - 1)
        ahead = last + 1
        while ahead <= end and (self.ready[ahead] or ahead in self._flights):
            ahead += 1
        # Half a window is fetched together, so that the requests are long.
        if ahead <= end and ahead - last <= 1 + window // 2:
            self._begin(ahead, end, is_wanted=False)

    def _need_thread(self) -> None:
        """Wake or start a thread for a flight that was queued."""
        self._condition.notify()
        queued = len(self._looks) + len(self._fetches) + len(self._ahead)
        if queued > self._idle and self._threads < _MAX_FETCHING_THREADS + _LOOKING_THREADS:
            self._threads += 1
            threading.Thread(target=self._work, name="qedfuse-fetch", daemon=True).start()

    def _work(self) -> None:
        """Run flights until there has been none for a while: the main function of a thread."""
        while True:
            with self._condition:
                step = self._next()
                while step is None:
                    self._idle += 1
                    woken = self._condition.wait(_IDLE_SECONDS)
                    self._idle -= 1
                    step = None if self._is_closed else self._next()
                    if step is None and (self._is_closed or not woken):
                        self._threads -= 1
                        return
            step()

    def _next(self) -> Callable[[], None] | None:
        """Take the next step of a flight out of the queues; None if there is none to take now."""
        if self._looks:
            flight = self._looks.popleft()
            return lambda: self._look(flight)
        if self._fetching < _MAX_FETCHING_THREADS:
            if self._fetches:
                flight = self._fetches.popleft()
                self._fetching += 1
                return lambda: self._fetch(flight)
            if self._ahead and self._prefetching < _MAX_PREFETCHES:
                flight = self._ahead.popleft()
                self._fetching += 1
                self._prefetching += 1
                return lambda: self._fetch_unwanted(flight)
        return None

    def _look(self, flight: Flight) -> None:
        """Look for the units of a flight in the cache; queue what is missing for a fetch."""
        missing = [unit for unit in range(flight.first, flight.last + 1) if not self._load(unit)]
        if missing:
            with self._condition:
                if not self._is_closed:
                    self._fetches.append(flight)
                    self._need_thread()
        else:
            self._finish(flight)

    def _load(self, unit: int) -> bool:
        """Make a unit ready if it is intact in the cache; return whether it is ready."""
        cache = self._cache
        if self.ready[unit]:
            return True
        if cache is None or cache.load(unit) is None:
            return False
        with self._condition:
            # Not ready, if another thread has found the cache damaged meanwhile.
            self.ready[unit] = self._cache is cache
            return bool(self.ready[unit])

    def _fetch_unwanted(self, flight: Flight) -> None:
        """Run a whole flight that no reader waits for."""
        try:
            self._fetch(flight)
        finally:
            with self._condition:
                self._prefetching -= 1
                if self._ahead:
                    self._need_thread()

    def _fetch(self, flight: Flight) -> None:
        """Fetch the units of a flight that are not ready, and end the flight."""
        error: HostError | None = None
        try:
            missing = [u for u in range(flight.first, flight.last + 1) if not self._load(u)]
            if missing:
                self._fetch_units(flight, missing[0], missing[-1])
        except HostError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001  a fault of a library must not leave readers waiting
            _log.exception("%s: cannot be fetched", self._source.address.shown)
            error = RemoteError(f"{self._source.address.shown}: {type(failure).__name__}")
        finally:
            with self._condition:
                self._fetching -= 1
                if self._fetches:
                    self._need_thread()
            self._finish(flight, error)

    def _fetch_units(self, flight: Flight, first: int, last: int) -> None:
        """Fetch adjacent units with one request; store them, or add them to the flight's blocks.

        Raises:
            HostError: The server does not give them.
        """
        start = first * UNIT_BYTES
        length = min((last + 1) * UNIT_BYTES, self._size) - start
        try:
            content = memoryview(self._source.get(start, length))
        except RemoteError as error:
            self._record_outage(error)
            raise
        self._record_outage(None)
        with self._condition:
            self.fetched_bytes += length
            self.requests += 1
        for unit in range(first, last + 1):
            begin = (unit - first) * UNIT_BYTES
            block = content[begin : begin + UNIT_BYTES]
            if not self.ready[unit] and not self._store(unit, block):
                flight.blocks[unit] = block

    def _store(self, unit: int, block: memoryview) -> bool:
        """Store a unit in the cache and make it ready; return whether that was done."""
        cache = self._cache
        if cache is None:
            return False
        try:
            cache.store(unit, block)
        except OSError as error:
            with self._condition:
                is_first, self._cannot_store = not self._cannot_store, True
                is_first = is_first and not self._is_closed
            if is_first:
                _log.warning("%s: cannot store in the cache: %s", cache.path, error.strerror)
            return False
        with self._condition:
            self._cannot_store = False
            self._stored_bytes += len(block)
            must_make_room = self._stored_bytes >= _MAX_UNCHECKED_BYTES
            if must_make_room:
                self._stored_bytes = 0
            self.ready[unit] = self._cache is cache
            is_ready = bool(self.ready[unit])
        if must_make_room and self._make_room is not None:
            self._make_room()
        return is_ready

    def _finish(self, flight: Flight, error: HostError | None = None) -> None:
        """Remove a flight from the table and end it; hold its blocks for later readers."""
        with self._condition:
            for unit in range(flight.first, flight.last + 1):
                if self._flights.get(unit) is flight:
                    del self._flights[unit]
            self._held.update(flight.blocks)
            while len(self._held) * UNIT_BYTES > _MAX_HELD_BYTES:
                self._held.popitem(last=False)
        flight.end(error)

    def _record_outage(self, error: RemoteError | None) -> None:
        """Log the first failed request of an outage, and the first answer after it."""
        with self._condition:
            was_out, self._is_out = self._is_out, error is not None
            if was_out == self._is_out or self._is_closed:
                return
        if error is None:
            _log.warning("%s: answers again", self._source.address.shown)
        else:
            _log.error("%s; what is not in the cache cannot be read", error)
