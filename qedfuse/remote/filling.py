"""Fetching many units of a file into the cache, which no reader waits for."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError
from qedfuse.remote.unitfile import UNIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from qedfuse.remote.flight import Flight
    from qedfuse.remote.remotefile import RemoteFile

MAX_RUN_UNITS: Final = 4
"""Number of adjacent units that one request fetches: 1 MiB."""


async def fill(
    file: RemoteFile,
    runs: Iterable[tuple[int, int]],
    *,
    max_requests: int,
    wait_turn: Callable[[], Awaitable[object]],
    report: Callable[[int], object],
) -> None:
    """Fetch runs of units, in their order; those that the cache has are compared with it only.

    A cancelled or failed call leaves the requests that are running, which fill the cache as well.

    Args:
        file: The file.
        runs: The first and the last unit of each run.
        max_requests: How many runs are queued for the server at a time.
        wait_turn: Awaited before each run; it must be a checkpoint.
        report: Called with the length in bytes of each run that is in the cache then.

    Raises:
        CacheError: The cache has not kept a unit.
        RemoteError: The server does not give a unit, or the file was closed.
    """
    running: deque[tuple[int, int, list[Flight]]] = deque()
    for first, last in runs:
        await wait_turn()
        running.append((first, last, file.fetcher.prefetch(first, last)))
        if len(running) == max_requests:
            report(await _wait(file, *running.popleft()))
    while running:
        report(await _wait(file, *running.popleft()))


async def _wait(file: RemoteFile, first: int, last: int, flights: list[Flight]) -> int:
    """Wait until a run was fetched; return its length in bytes.

    Raises:
        CacheError: The cache has not kept a unit of the run.
        RemoteError: The server does not give a unit, or the file was closed.
    """
    for flight in flights:
        await flight.wait()
    if not file.fetcher.is_stored(first, last):
        msg = f"{file.name}: found no room in the cache, expected room for all that is needed of it"
        raise CacheError(msg)
    return min((last + 1) * UNIT_BYTES, file.size()) - first * UNIT_BYTES
