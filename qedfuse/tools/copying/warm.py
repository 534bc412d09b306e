"""Fetching a remote image into the cache before it is needed: tables first, then its data."""

from __future__ import annotations

from collections import deque
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CacheError, UsageError
from qedfuse.ondisk.formats import SIGNATURE_BYTES
from qedfuse.remote.address import is_url
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.remote.unitfile import UNIT_BYTES, units_of
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import format_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.remote.flight import Flight
    from qedfuse.util.backgroundtasks import Progress

_MAX_REQUEST_UNITS: Final = 4
_MAX_REQUESTS: Final = 8
"""How many requests are queued at a time.  A request that waits too long in the queue fails."""
_CLUSTERS_PER_LOOKUP: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class WarmedFile:
    """What the cache has of one file of the chain.

    Attributes:
        url: The normalised URL, without its query.
        cached_bytes: How many bytes were wanted, and are in the cache.
        fetched_bytes: How many of them were not in the cache before.
        is_complete: Whether all bytes of the file are in the cache, so that no server is needed.
    """

    url: str
    cached_bytes: int
    fetched_bytes: int
    is_complete: bool


async def warm(
    url: str, options: OpenOptions | None = None, *, progress: Progress | None = None
) -> list[WarmedFile]:
    """Fetch what a mount of an image can need into the cache: the image, then its bases.

    Of a QED image these are the tables and the allocated clusters, of a raw file all bytes.  What
    is in the cache and intact is not fetched again, so an interrupted call can be repeated.

    Args:
        url: The URL of the image.
        options: How to open it and its bases, and where the cache is; None for the defaults.
        progress: Called with the number of bytes that are in the cache, and the number that are
            wanted in all files.

    Raises:
        UsageError: A path was given, or the URL is not valid.
        CacheError: There is no cache, or not enough room in it.
        RemoteError: A server cannot be reached, or does not serve a file.
        QedError: An image cannot be opened, or a base is refused.
    """
    if not is_url(url):
        msg = f"{printable(url)}: found a path, expected a URL"
        raise UsageError(msg)
    options = options or OpenOptions()
    async with AsyncExitStack() as stack:
        async with open_image(url, None, options.remote) as first:
            found = format_of(await first.pread(0, SIGNATURE_BYTES), first.name)
            probed = first.fetcher.fetched_bytes if isinstance(first, RemoteFile) else 0
        if found == "qed":
            disk = await stack.enter_async_context(open_disk(url, options))
            layers: list[Layer | None] = list(disk.chain.layers)
            files = [layer.file for layer in disk.chain.layers]
        else:
            layers = [None]
            files = [await stack.enter_async_context(open_image(url, None, options.remote))]
        parts = [
            _Part(file, layer, 0 if depth else probed)
            for depth, (file, layer) in enumerate(zip(files, layers, strict=True))
            if isinstance(file, RemoteFile)
        ]
        for part in parts:
            part.want_tables()
            await part.fill(lambda _: None)
        for part in parts:
            await part.want_data()
        total = sum(part.wanted_bytes for part in parts)
        done = 0

        def report(length: int) -> None:
            nonlocal done
            done += length
            if progress is not None:
                progress(done, total)

        for part in parts:
            await part.fill(report)
        return [part.result() for part in parts]


class _Part:
    """One file of the chain, and which of its units are wanted."""

    def __init__(self, file: RemoteFile, layer: Layer | None, fetched_before: int) -> None:
        """Fetch an open file.

        Args:
            file: The file.
            layer: The layer of the file; None for a raw file without a chain.
            fetched_before: How many bytes were fetched before the file was opened.
        """
        self._file = file
        self._fetched_before = fetched_before
        self._layer = layer if isinstance(layer, QedLayer) else None
        self._size = file.size()
        self._wanted = bytearray(units_of(self._size))

    @property
    def wanted_bytes(self) -> int:
        """How many bytes the wanted units have."""
        missing = len(self._wanted) * UNIT_BYTES - self._size
        return sum(self._wanted) * UNIT_BYTES - (missing if self._wanted[-1:] == b"\1" else 0)

    def want_tables(self) -> None:
        """Want the header and all tables of an image; nothing of a raw file."""
        layer = self._layer
        if layer is None:
            return
        self._want(0, layer.header.header_end)
        length = layer.geometry.table_bytes
        self._want(layer.header.l1_table_offset, length)
        for offset in layer.l2_tables.tolist():
            self._want(offset, length)

    async def want_data(self) -> None:
        """Want the allocated clusters of an image, whose tables are in the cache; or a whole file.

        Entries that are not valid are left out, because nothing can be read by them.
        """
        layer = self._layer
        if layer is None:
            self._want(0, self._size)
            return
        step = _CLUSTERS_PER_LOOKUP * layer.geometry.cluster_size
        for start in range(0, layer.size, step):
            for extent in await layer.lookup(start, min(step, layer.size - start)):
                if extent.kind is Kind.DATA:
                    self._want(extent.file_offset, extent.length)

    async def fill(self, report: Callable[[int], None]) -> None:
        """Fetch the wanted units that are not in the cache.

        Args:
            report: Called with the length of each range that is in the cache then.

        Raises:
            CacheError: The cache cannot keep a unit.
            RemoteError: The server does not give a unit.
        """
        running: deque[tuple[int, int, list[Flight]]] = deque()
        for first, last in self._runs():
            running.append((first, last, self._file.fetcher.prefetch(first, last)))
            if len(running) == _MAX_REQUESTS:
                report(await self._wait(*running.popleft()))
        while running:
            report(await self._wait(*running.popleft()))

    def result(self) -> WarmedFile:
        """Return what the cache has now."""
        fetcher = self._file.fetcher
        return WarmedFile(
            self._file.name,
            self.wanted_bytes,
            self._fetched_before + fetcher.fetched_bytes,
            is_complete=0 not in fetcher.ready,
        )

    def _want(self, offset: int, length: int) -> None:
        """Want the units of a range, as far as the file has them."""
        first = offset // UNIT_BYTES
        end = min(units_of(offset + length), len(self._wanted))
        if first < end:
            self._wanted[first:end] = b"\1" * (end - first)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Yield the first and last unit of each run of adjacent wanted units, of limited length."""
        first = self._wanted.find(1)
        while first >= 0:
            end = self._wanted.find(0, first, first + _MAX_REQUEST_UNITS)
            if end < 0:
                end = min(first + _MAX_REQUEST_UNITS, len(self._wanted))
            yield first, end - 1
            first = self._wanted.find(1, end)

    async def _wait(self, first: int, last: int, flights: list[Flight]) -> int:
        """Wait until a run was fetched; return its length in bytes."""
        for flight in flights:
            await flight.wait()
        if self._file.fetcher.ready.find(0, first, last + 1) >= 0:
            msg = f"{self._file.name}: found no room in the cache, expected {self.wanted_bytes} "
            msg += "bytes of it"
            raise CacheError(msg)
        return min((last + 1) * UNIT_BYTES, self._size) - first * UNIT_BYTES
