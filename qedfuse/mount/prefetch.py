"""Option ``prefetch=all``: fetching all data of remote files that the disks of a mount can need.

The tables of all files come first, then their data.  The prefetch begins no request while a reader
waits for a server, or in the next 0.1 seconds, because the reader will probably need further data
soon.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.neededunits import NeededUnits
from qedfuse.errors import CacheError, HostError, ObjectChangedError, RemoteError
from qedfuse.remote.filling import MAX_RUN_UNITS, fill, mark_usable_offline
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.disk.disk import Disk

_log = logging.getLogger(__name__)

_MAX_REQUESTS: Final = 3
"""Maximum number of requests of 1 MiB that the prefetch has in flight.  For each file, at most 4
requests for data that no reader waits for are in flight (`qedfuse.remote.fetchthreads`).  So at
least one is left for the read-ahead of sequential readers."""
_QUIET_SECONDS: Final = 0.1
"""Time without a waiting reader before a request begins."""
_PAUSE_SECONDS: Final = 30.0
"""Time between a failure of a server and the prefetch's next attempt."""


class Prefetch:
    """Fetches into the cache all data of remote files that the given disks can need."""

    def __init__(self, disks: Iterable[Disk], mountpoint: str) -> None:
        """Fetch for ``disks``; log with the name of ``mountpoint``."""
        self._shown = printable(mountpoint)
        self._files = [
            (layer.file, NeededUnits(layer))
            for disk in disks
            for layer in disk.chain.layers
            if isinstance(layer.file, RemoteFile)
        ]

    async def run(self) -> None:
        """Fetch all that is needed, and log the end.

        After a failure of a server the task pauses and tries again.  It ends early if a server has
        another version of an object, if the cache fails, or if the mount ends.
        """
        try:
            for file, units in self._files:
                units.add_tables()
                await self._fill(file, units)
            for file, units in self._files:
                await self._add_data(file, units)
                await self._fill(file, units)
            for file, units in self._files:
                await mark_usable_offline(file, units.mask)
        except (CacheError, HostError) as error:
            if not self._is_closed():
                _log.warning("%s: prefetch ended: %s", self._shown, error)
            return
        if self._files:
            needed = sum(units.total_bytes for _, units in self._files)
            fetched = sum(file.fetcher.fetched_bytes for file, _ in self._files)
            _log.info(
                "%s: prefetch ended: all %d bytes that the disks can need are in the cache "
                "(fetched since the mount began: %d)",
                *(self._shown, needed, fetched),
            )

    async def _add_data(self, file: RemoteFile, units: NeededUnits) -> None:
        """Add the units that hold a file's data to ``units``; try again after a failure.

        The file's tables must be in the cache.
        """
        while True:
            try:
                await units.add_data()
            except RemoteError as error:
                await self._pause(file, error)
            else:
                return

    async def _fill(self, file: RemoteFile, units: NeededUnits) -> None:
        """Fetch the units of a file; try again after a failure."""
        while True:
            try:
                await fill(
                    file,
                    units.runs(MAX_RUN_UNITS),
                    max_requests=_MAX_REQUESTS,
                    verify=False,
                    wait_turn=self._wait_for_quiet,
                    report=lambda _: None,
                )
            except RemoteError as error:
                await self._pause(file, error)
            else:
                return

    async def _pause(self, file: RemoteFile, error: RemoteError) -> None:
        """Wait after a failure of a server; raise ``error`` if another attempt would fail too."""
        if isinstance(error, ObjectChangedError) or file.fetcher.is_closed:
            raise error
        await trio.sleep(_PAUSE_SECONDS)

    async def _wait_for_quiet(self) -> None:
        """Wait until `_QUIET_SECONDS` have passed without a waiting reader; always a checkpoint."""
        await trio.lowlevel.checkpoint()
        while (quiet := self._quiet_seconds()) < _QUIET_SECONDS:  # noqa: ASYNC110  a time
            await trio.sleep(_QUIET_SECONDS - quiet)

    def _quiet_seconds(self) -> float:
        """Return for how many seconds no reader of any of the files has waited."""
        return min((file.fetcher.quiet_seconds() for file, _ in self._files), default=math.inf)

    def _is_closed(self) -> bool:
        """Return whether a file was closed, because the mount ends."""
        return any(file.fetcher.is_closed for file, _ in self._files)
