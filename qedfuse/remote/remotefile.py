"""One version of an object as a file of a chain: a `HostFile` that cannot be changed.

The object is divided into units of `UNIT_BYTES`.  Units that are ready (`UnitStore.ready`) are read
from the page cache, like a local file.  Other units are first fetched from the disk or the server.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import trio

from qedfuse.hostio.readonlyfile import ReadOnlyFile, ServerReads
from qedfuse.remote.unitfile import UNIT_BYTES

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import Buffer, FileIdentity
    from qedfuse.hostio.pagesource import PageSource
    from qedfuse.hostio.serversilence import ServerSilence
    from qedfuse.remote.fetcher import Fetcher
    from qedfuse.remote.flight import Flight
    from qedfuse.remote.localdata import LocalData
    from qedfuse.remote.object import RemoteObject


class RemoteFile(ReadOnlyFile):
    """A file on a server, read through the cache.

    Attributes:
        path: The URL.
        fetcher: Fetches units that cannot be read from the page cache.
    """

    def __init__(self, source: RemoteObject, fetcher: Fetcher, local: LocalData | None) -> None:
        """Make a file of an object; `qedfuse.remote.opening.open_remote` makes the arguments.

        Args:
            source: The object.
            fetcher: Fetches from ``source``; `close` closes the fetcher.
            local: The data file of the fetcher's cache, which `close` closes; None for no cache.
        """
        super().__init__(source.address.shown)
        self.path = source.address.url
        self.fetcher = fetcher
        self._version = source.version
        self._size = source.version.size
        self._opened = time.time()
        self._last_unit = -1  # the last unit of the last read that the fetcher has recorded
        self._local = local

    @property
    def page_source(self) -> PageSource | None:
        """The data file of the cache; None if there is none, or the mount must not read it itself.

        The mount reads such a file without this object (`PageSource`).
        """
        if self._local is None:
            return None
        return self._local.page_source(
            self.fetcher.ready, self.fetcher.zeros, self._size, self.fetcher.forget
        )

    @property
    def server_reads(self) -> ServerReads:
        """What the fetcher has fetched from the server."""
        fetcher = self.fetcher
        return ServerReads(fetcher.requests, fetcher.awaited_requests, fetcher.fetched_bytes)

    @property
    def silence(self) -> ServerSilence:
        """Limits how long fills wait for the server while it does not answer."""
        return self.fetcher.silence

    @property
    def identity(self) -> FileIdentity:
        """The URL, the size and the validator of the version."""
        return (self.path, self._size, self._version.validator)

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read: fewer only at the end.

        Raises:
            RemoteError: A unit is not in the cache, and the server does not give it; or the file is
                closed.
        """
        length = max(0, min(len(view), self._size - offset))
        if not length:
            await trio.lowlevel.checkpoint()
            return 0
        at = 0
        while at < length:
            flights = self._demand(offset + at, length - at)
            try:
                for flight in flights:
                    with self.silence.waiting(flight.needs_server):
                        await flight.wait()
            finally:
                self.fetcher.release(flights)
            at += self._fill(offset + at, view[at:length], flights)
        return length

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; see `ReadableFile.read_blocking`.

        Raises:
            RemoteError: As in `pread_into`.
            trio.Cancelled: The calling thread is one of trio, and its task was cancelled.
        """
        length = max(0, min(len(view), self._size - offset))
        at = 0
        while at < length:
            flights = self._demand(offset + at, length - at)
            try:
                for flight in flights:
                    flight.wait_blocking()
            finally:
                self.fetcher.release(flights)
            at += self._fill(offset + at, view[at:length], flights)
        return length

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from a file offset without blocking; return whether that succeeded.

        Returns False if a unit is not ready, if a byte is not in the page cache, or if the file
        ends before the view is full.  The content of ``view`` is undefined then.
        """
        end = offset + len(view)
        first, last = offset // UNIT_BYTES, (end - 1) // UNIT_BYTES
        if end > self._size or not self._is_ready(first, last):
            return False
        if first != self._last_unit:
            self._last_unit = last
            self.fetcher.record_read(first, last)
        return self._read_cached(offset, view)

    async def next_data(self, offset: int) -> int | None:
        """Return ``offset`` itself, because servers report no holes; None at or past the end."""
        await trio.lowlevel.checkpoint()
        return offset if offset < self._size else None

    async def next_hole(self, offset: int) -> int | None:
        """Return the end of the file; None if ``offset`` is at or past the end."""
        await trio.lowlevel.checkpoint()
        return self._size if offset < self._size else None

    def size(self) -> int:
        """Return the file's length in bytes."""
        return self._size

    def stat(self) -> os.stat_result:
        """Return attributes like those of a read-only local file of this user."""
        modified = self._opened if self._version.modified is None else self._version.modified
        return self._status(modified)

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system of the cache; of ``/`` without a cache."""
        return os.statvfs("/") if self._local is None else self._local.statvfs()

    def stop_fetching(self) -> None:
        """Let no read wait for the server any more: such reads fail, the present ones too."""
        self.fetcher.close()

    def close(self) -> None:
        """Close the file; reads that wait for the server fail.  A second call does nothing."""
        self.fetcher.close()
        if self._local is not None:
            self._local.close()

    def _demand(self, offset: int, length: int) -> list[Flight]:
        """Start fetching the units of a range that are not ready; return their flights."""
        first, last = offset // UNIT_BYTES, (offset + length - 1) // UNIT_BYTES
        if first == last == self._last_unit and self._is_ready(first, last):
            return []
        self._last_unit = last
        return self.fetcher.demand(first, last)

    def _is_ready(self, first: int, last: int) -> bool:
        """Return whether all units ``first`` to ``last`` are ready; see `UnitStore.ready`."""
        return self.fetcher.ready.find(0, first, last + 1) < 0

    def _fill(self, offset: int, view: memoryview, flights: list[Flight]) -> int:
        """Fill ``view`` from flights that have ended and from the cache.

        Returns how many bytes at the beginning of ``view`` are valid; the caller must demand the
        rest.
        """
        filled = len(view)
        for start, count, block in self._parts(offset, len(view), flights):
            part = view[start - offset : start - offset + count]
            if block is not None:
                part[:] = block
            elif not self._read_cached(start, part):
                # `_read_cached` has marked the units of this part as not ready.  The further parts
                # are tried as well, so that the caller demands all such units together.
                filled = min(filled, start - offset)
        return filled

    def _parts(
        self, offset: int, length: int, flights: list[Flight]
    ) -> list[tuple[int, int, Buffer | None]]:
        """Divide a range whose flights have ended into parts, each in one unit.

        Returns (file offset, number of bytes, content) of each part; the content is None if no
        flight has it.
        """
        blocks = {unit: block for flight in flights for unit, block in flight.blocks.items()}
        parts: list[tuple[int, int, Buffer | None]] = []
        end = offset + length
        at = offset
        while at < end:
            unit, within = divmod(at, UNIT_BYTES)
            stop = min(end, at - within + UNIT_BYTES)
            block = blocks.get(unit)
            if block is not None:
                parts.append((at, stop - at, memoryview(block)[within : within + stop - at]))
            else:
                parts.append((at, stop - at, None))
            at = stop
        return parts

    def _read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache; return whether that succeeded.

        If the read of ready units fails, the units are made not ready.  If the data file was
        truncated, the cache is not used any more.
        """
        first, last = offset // UNIT_BYTES, (offset + len(view) - 1) // UNIT_BYTES
        local = self._local
        if local is None or not self._is_ready(first, last):
            return False
        # If another thread makes the units not ready during the read, the bytes do not count.
        if local.try_read(offset, view, self.fetcher.zeros) and self._is_ready(first, last):
            return True
        if local.is_whole():
            self.fetcher.forget(first, last)
        else:
            self.fetcher.discard_cache()
        return False
