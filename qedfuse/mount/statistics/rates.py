"""Hit rates of a disk, computed from its counters, or from the growth of the counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ONE_STEP_OPERATIONS: Final = ("read", "write", "flush")
"""The operations that can be answered in one step, without waiting."""


def hit_rates(disk: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the hit rates of a disk, from 0 to 1; None for a rate without requests.

    These are the hits:

    - ``fast_path``: reads, writes and flushes that were answered in one step, without waiting.
    - ``table_cache``: reads, writes and discards for which no slice of a table had to be loaded.
    - ``host_cache``: reads of local files, tables included, whose data the host's page cache had.
    - ``remote_cache``: reads of remote files for which no reader waited for a server.  Readers also
      wait for tables, which do not count as reads, so the rate can be too low after the start.
    """
    requests, files = disk["requests"], disk["files"]
    loads = disk["table_cache"]["loads"]
    local = [file for file in files if file["uncached_reads"] is not None]
    remote = [file for file in files if file["server"] is not None]
    fast = sum(requests[name]["fast"] for name in ONE_STEP_OPERATIONS)
    of_tables = _requests(requests, ("read", "write", "discard"))
    local_reads = sum(file["reads"] + file["table_loads"] for file in local)
    return {
        "fast_path": _share(fast, _requests(requests, ONE_STEP_OPERATIONS)),
        "table_cache": _share(of_tables - loads, of_tables),
        "host_cache": _share(
            local_reads - sum(file["uncached_reads"] for file in local),
            local_reads,
        ),
        "remote_cache": _share(
            sum(file["reads"] - file["server"]["awaited_requests"] for file in remote),
            sum(file["reads"] for file in remote),
        ),
    }


def _requests(requests: Mapping[str, Any], names: Iterable[str]) -> int:
    """Return the number of requests of some operations together."""
    return sum(requests[name]["requests"] for name in names)


def _share(hits: int, total: int) -> float | None:
    """Return a rate from 0 to 1; None if ``total`` is 0.

    ``hits`` may be less than 0, because one request can cause several misses.
    """
    return max(0.0, min(1.0, hits / total)) if total > 0 else None
