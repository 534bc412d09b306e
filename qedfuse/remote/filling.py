"""Fetching many units of a file into the cache before readers need them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import CacheError
from qedfuse.remote.unitfile import UNIT_BYTES
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from qedfuse.remote.flight import Flight
    from qedfuse.remote.remotefile import RemoteFile

MAX_RUN_UNITS: Final = 4
"""Maximum number of adjacent units in one of the ``runs`` for `fill`: 1 MiB."""
_EVICTION_PAUSE_SECONDS: Final = 0.2
"""Pause between two attempts to store a run while entries of the cache are being removed."""


async def fill(
    file: RemoteFile,
    runs: Iterable[tuple[int, int]],
    *,
    max_requests: int,
    verify: bool,
    wait_turn: Callable[[], Awaitable[object]],
    report: Callable[[int], object],
) -> None:
    """Fetch the units of ``runs`` that the cache does not have, in the order of ``runs``.

    After a failure or a cancellation, running requests continue and store their units.

    Args:
        file: The file.
        runs: The first and the last unit of each run.
        max_requests: Maximum number of runs that are queued or being fetched at a time.
        verify: Whether to verify the checksum of each unit that the cache already has, and to fetch
            the unit again if it is damaged.
        wait_turn: Called and awaited before each run.  The call must be a checkpoint of trio.
        report: Called with the length in bytes of a run when the run is in the cache.

    Raises:
        CacheError: The cache has no space for a unit, or cannot store it for another reason.
        RemoteError: The server does not give a unit, or the file was closed.
    """
    fetcher = file.fetcher
    running: deque[tuple[int, int, list[Flight]]] = deque()
    for first, last in runs:
        await wait_turn()
        # A thread asks the cache, because calls on its file system may block.
        if not verify and await _in_thread(fetcher.is_stored, first, last):
            report(_length(file, first, last))
            continue
        running.append((first, last, fetcher.prefetch(first, last)))
        if len(running) == max_requests:
            report(await _wait(file, *running.popleft()))
    while running:
        report(await _wait(file, *running.popleft()))


async def mark_usable_offline(file: RemoteFile, needed: bytes) -> bool:
    """Record that the cache has all that readers of a file need; return whether it was recorded.

    A failure is logged.  A cancelled task does not wait for the thread that writes the record.
    ``needed`` has a byte for each unit: 1 if readers need the unit, and 0 if they do not.
    """
    record = file.fetcher.mark_usable_offline
    return await run_in_thread(record, needed, abandon_on_cancel=True)


async def _wait(file: RemoteFile, first: int, last: int, flights: list[Flight]) -> int:
    """Wait until a run is in the cache; return its length in bytes."""
    fetcher = file.fetcher
    while True:
        for flight in flights:
            await flight.wait()
        was_evicting = fetcher.is_evicting
        if await _in_thread(fetcher.store_held, first, last):
            return _length(file, first, last)
        if not fetcher.has_cache:
            msg = (
                f"{file.name}: found the file of the cache truncated by another program, "
                "expected it whole (the next opening makes a new file)"
            )
            raise CacheError(msg)
        if not was_evicting and not fetcher.is_evicting:
            msg = f"{file.name}: found no space in the cache, expected space for all needed units"
            raise CacheError(msg)
        await trio.sleep(_EVICTION_PAUSE_SECONDS)
        flights = fetcher.prefetch(first, last)


def _length(file: RemoteFile, first: int, last: int) -> int:
    """Return the number of bytes in the units ``first`` to ``last``."""
    return min((last + 1) * UNIT_BYTES, file.size()) - first * UNIT_BYTES


async def _in_thread(call: Callable[[int, int], bool], first: int, last: int) -> bool:
    """Call a function in a thread for a run; a cancelled task does not wait for the thread."""
    return await run_in_thread(call, first, last, abandon_on_cancel=True)
