"""Getting the units (pieces of an object) of a `Flight`, which is one fetch of adjacent units."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from qedfuse.errors import HostError, RemoteError
from qedfuse.hostio.serversilence import ServerSilence
from qedfuse.remote.bufferpool import BufferPool
from qedfuse.remote.outagelog import OutageLog
from qedfuse.remote.unitfile import UNIT_BYTES, blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.flight import Flight
    from qedfuse.remote.object import RemoteObject
    from qedfuse.remote.unitstore import UnitStore


class FlightLoader:
    """Gets the units of flights of one version of an object, and stores them in the cache.

    Threads may use a loader concurrently, each for its own flights.

    Attributes:
        fetched_bytes: Number of bytes of the object that the server has sent.
        requests: Number of requests that the server has answered with a range.
        awaited_requests: Number of these requests for which a reader waited.
        silence: Limits how long fills wait for the server while it does not answer.
    """

    def __init__(
        self,
        source: RemoteObject,
        store: UnitStore,
        finish: Callable[[Flight, HostError | None], None],
    ) -> None:
        """Prepare to get units; no request is sent yet.

        Args:
            source: The object, which the loader closes.
            store: Where fetched units are stored; the caller closes it.
            finish: Ends a flight, with an error if it does not have its units.
        """
        self._source = source
        self._size = source.version.size
        self._store = store
        self._ready = store.ready
        self._finish = finish
        self._is_closed = False
        self._outages = OutageLog(source.address.shown, "what is not in the cache cannot be read")
        self.silence = ServerSilence(source.attempt_seconds)
        self._buffers = BufferPool()
        self._counting = threading.Lock()
        # `_counting` protects the following attributes.
        self.fetched_bytes = 0
        self.requests = self.awaited_requests = 0

    def clear_buffers(self) -> None:
        """Free the memory that is kept for the next requests."""
        self._buffers.clear()

    def close(self) -> None:
        """Close the object (`RemoteObject.close`); later failures are not logged as outages."""
        self._is_closed = True
        self._source.close()

    def missing(self, flight: Flight) -> list[int]:
        """Return the units of a flight that must be fetched; add cached units to its blocks.

        A unit need not be fetched if it may be read from the page cache (`UnitStore.ready`), is in
        the blocks, or is intact in the cache.
        """
        units = range(flight.first, flight.last + 1)
        missing = [unit for unit in units if not self._ready[unit] and unit not in flight.blocks]
        if missing and self._store.has_any(missing[0], missing[-1]):
            for unit in missing.copy():
                content = self._store.load(unit)
                if content is not None:
                    flight.blocks[unit] = content
                    missing.remove(unit)
        flight.is_missing = bool(missing)
        return missing

    def fetch(self, flights: deque[Flight]) -> None:
        """Fetch the missing units of adjacent flights; end each flight and remove it."""
        try:
            while flights:
                parts = self._next_parts(flights)
                if parts:
                    self._fetch_parts(flights, parts)
                else:
                    self._finish(flights.popleft(), None)
        except HostError as error:
            while flights:
                self._finish(flights.popleft(), error)

    def _next_parts(self, flights: Iterable[Flight]) -> list[range]:
        """Return the units that the next request must fetch, as one range for each flight.

        One request can serve several of the flights, from the first one on.

        The ranges are adjacent, and each begins and ends with a missing unit of its flight.  The
        list is empty if the first flight needs no unit.
        """
        parts: list[range] = []
        for flight in flights:
            missing = self.missing(flight)
            if not missing or (parts and missing[0] != parts[-1].stop):
                break
            parts.append(range(missing[0], missing[-1] + 1))
        return parts

    def _fetch_parts(self, flights: deque[Flight], parts: list[range]) -> None:
        """Fetch adjacent units with one request: a part for each of the first flights.

        A flight ends, and is removed from ``flights``, when its part is stored or held in memory.
        """
        start = parts[0].start * UNIT_BYTES
        lengths = [
            min(part.stop * UNIT_BYTES, self._size) - part.start * UNIT_BYTES for part in parts
        ]
        sent = time.monotonic()
        arriving = deque(parts)
        is_awaited = False

        def deliver(content: Buffer) -> None:
            nonlocal is_awaited
            self._outages.answered(sent)
            self.silence.answered()
            flight = flights[0]
            with self._counting:
                self.fetched_bytes += len(memoryview(content))
                self.requests += len(arriving) == len(parts)
                self.awaited_requests += flight.is_wanted and not is_awaited
                is_awaited = is_awaited or flight.is_wanted
            self._keep(flight, arriving.popleft(), content)
            self._finish(flights.popleft(), None)

        try:
            self._source.get_parts(
                *(start, lengths, deliver),
                allocate=self._buffers.take,
                is_brief=flights[0].is_brief,
            )
        except RemoteError as error:
            if not self._is_closed:
                self._outages.failed(error)
            raise

    def _keep(self, flight: Flight, units: range, content: Buffer) -> None:
        """Add fetched units to the blocks of a flight, and store them or hold them in memory."""
        blocks = dict(blocks_of(units.start, content))
        new = {
            unit: block
            for unit, block in blocks.items()
            if not self._ready[unit] and unit not in flight.blocks
        }
        flight.blocks.update(blocks)
        # Usually all fetched units are new, and are written with one call.
        pieces = {units.start: content} if len(new) == len(blocks) else new
        for first, piece in pieces.items():
            if not self._store.store(first, piece):
                for unit, block in blocks_of(first, piece):
                    self._store.hold(unit, block)
