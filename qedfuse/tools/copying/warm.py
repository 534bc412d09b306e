"""Fetching a remote image into the cache before a mount needs it: first tables, then data."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.imageopening import open_image
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.neededunits import NeededUnits
from qedfuse.disk.opening import open_disk_in
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CacheError, UsageError
from qedfuse.ondisk.formats import SIGNATURE_BYTES
from qedfuse.remote.address import is_url, parse_address
from qedfuse.remote.filling import MAX_RUN_UNITS, fill, mark_usable_offline
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import format_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.util.backgroundtasks import Progress

_MAX_REQUESTS: Final = 8
"""Maximum number of requests that are queued or running at a time.

With more, a request could wait in the queue for longer than the time limit of a read, and fail.
"""


@dataclass(frozen=True, slots=True)
class WarmedFile:
    """The content of the cache for one file of the chain.

    Attributes:
        url: The normalised URL, without a secret query.
        cached_bytes: Number of bytes that a mount can need; the cache has all of them.
        fetched_bytes: Number of bytes that were fetched from the server.
        is_complete: Whether the cache could record that all needed bytes are there, so that the
            file can be read without its server.
    """

    url: str
    cached_bytes: int
    fetched_bytes: int
    is_complete: bool


async def warm(
    url: str, options: OpenOptions | None = None, *, progress: Progress | None = None
) -> list[WarmedFile]:
    """Fetch into the cache all that a mount of an image can need of the image and its bases.

    These are the tables and the allocated clusters of a QED image, and all bytes of a raw file.
    Units (blocks of 256 KiB) that are intact in the cache are not fetched again.

    Args:
        url: The URL of the image.
        options: How to open the image and its bases, and where the cache is; None for the defaults.
        progress: Called with the number of needed bytes that are in the cache, and the number of
            all needed bytes.

    Raises:
        UsageError: ``url`` is a path, the URL of an NBD server, or not valid; or the object is an
            image of a foreign format, or encrypted by LUKS.
        CacheError: There is no cache, or it has not enough space.
        RemoteError: A server cannot be reached, or does not serve a file.
        QedError: An image cannot be opened, or a base is refused.
    """
    if not is_url(url):
        msg = f"{printable(url)}: found a path, expected a URL"
        raise UsageError(msg)
    address = parse_address(url)
    if address.is_nbd:
        msg = (
            f"{address.shown}: found an NBD server, expected an object store or a web server "
            "(exports of NBD servers are not cached)"
        )
        raise UsageError(msg)
    options = options or OpenOptions()
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(open_image(url, None, options.remote))
        if format_of(await file.pread(0, SIGNATURE_BYTES), file.name) == "qed":
            disk = await stack.enter_async_context(open_disk_in(file, url, options))
            layers: list[Layer] = list(disk.chain.layers)
        else:
            layers = [RawLayer(file)]
        files = [
            _NeededFile(layer.file, layer) for layer in layers if isinstance(layer.file, RemoteFile)
        ]
        for item in files:
            item.require_cache()
            item.units.add_tables()
        _require_within_limit(url, files, options.remote.cache_bytes)
        for item in files:
            await item.fill(lambda _: None)  # only the tables, from which `add_data` finds the data
            await item.units.add_data()
        _require_within_limit(url, files, options.remote.cache_bytes)
        total = sum(item.units.total_bytes for item in files)
        done = 0

        def report(length: int) -> None:
            nonlocal done
            done += length
            if progress is not None:
                progress(done, total)

        for item in files:
            await item.fill(report)
        return [await item.result() for item in files]


class _NeededFile:
    """One remote file of the chain, and its units that a mount can need."""

    def __init__(self, file: RemoteFile, layer: Layer) -> None:
        """Take ``file``, the open file of ``layer``; the caller must then add the needed units."""
        self.units = NeededUnits(layer)
        self._file = file

    def require_cache(self) -> None:
        """Raise CacheError if the cache cannot store the file."""
        if not self._file.fetcher.has_cache:
            msg = (
                f"{self._file.name}: found no cache to fetch it into, expected a directory of the "
                "cache that can be used, and a server that gives an ETag or a time of modification"
            )
            raise CacheError(msg)

    async def fill(self, report: Callable[[int], object]) -> None:
        """Fetch the needed units; call ``report`` with the number of bytes of each run of units."""
        await fill(
            self._file,
            self.units.runs(MAX_RUN_UNITS),
            max_requests=_MAX_REQUESTS,
            verify=True,
            wait_turn=trio.lowlevel.checkpoint,
            report=report,
        )

    async def result(self) -> WarmedFile:
        """Record that the cache has all needed units; return the numbers of bytes."""
        fetcher = self._file.fetcher
        return WarmedFile(
            self._file.name,
            self.units.total_bytes,
            fetcher.fetched_bytes,
            is_complete=await mark_usable_offline(self._file, self.units.mask),
        )


def _require_within_limit(url: str, files: list[_NeededFile], max_bytes: int | None) -> None:
    """Raise CacheError if the needed bytes of all files exceed the limit of the cache."""
    total = sum(item.units.total_bytes for item in files)
    if max_bytes is not None and total > max_bytes:
        msg = (
            f"{parse_address(url).shown}: found {total} bytes to keep in the cache, expected at "
            f"most {max_bytes} (the limit of its size)"
        )
        raise CacheError(msg)
