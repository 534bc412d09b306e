"""What the disks of a mount have done between two readings of the mount's statistics.

Each reading is a document of `qedfuse.mount.statistics.document`; docs/stats.md describes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qedfuse.mount.statistics.rates import hit_rates

if TYPE_CHECKING:
    from collections.abc import Mapping


class Interval:
    """The activity of one disk in an interval.

    Attributes:
        seconds: Length of the interval.
        disk: The later document's part about the disk, with counters and hit rates of the interval.
    """

    def __init__(self, seconds: float, disk: Mapping[str, Any]) -> None:
        """Describe an interval; the arguments are the attributes."""
        self.seconds = max(seconds, 1e-9)  # never 0, because counters are divided by it
        self.disk = disk

    def rate(self, operation: str, counter: str = "requests") -> float:
        """Return how much a counter of an operation has grown per second."""
        return float(self.disk["requests"][operation][counter]) / self.seconds

    def average(self, operation: str) -> float | None:
        """Return the average time of an operation's requests in seconds; None without requests."""
        counted = self.disk["requests"][operation]
        requests = counted["requests"]
        return float(counted["seconds"]) / requests if requests else None

    @property
    def queue_length(self) -> float:
        """How many requests were in progress on average, by Little's law."""
        counted = self.disk["requests"].values()
        return float(sum(one["seconds"] for one in counted)) / self.seconds

    @property
    def errors(self) -> float:
        """How many requests per second have failed."""
        counted = self.disk["requests"].values()
        return float(sum(one["errors"] for one in counted)) / self.seconds


def intervals(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[Interval]:
    """Return what each disk of a mount has done between two documents.

    If ``before`` is None or comes from another process, the intervals begin with the mount.
    """
    if before is None or before["pid"] != after["pid"]:
        return [Interval(after["uptime_seconds"], disk) for disk in after["disks"]]
    seconds = after["uptime_seconds"] - before["uptime_seconds"]
    pairs = zip(before["disks"], after["disks"], strict=True)
    return [Interval(seconds, _difference(old, new)) for old, new in pairs]


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``new`` (about a disk) whose counters are the differences to ``old``.

    Counters that no report of an interval shows, such as the evictions of the table cache, remain.
    """
    loads = new["table_cache"]["loads"] - old["table_cache"]["loads"]
    allocated = new["space"]["allocated_clusters"] - old["space"]["allocated_clusters"]
    changed = {
        **new,
        "requests": {
            name: _subtracted(old["requests"][name], counted)
            for name, counted in new["requests"].items()
        },
        "table_cache": {**new["table_cache"], "loads": loads},
        "space": {**new["space"], "allocated_clusters": allocated},
        "writeback": _subtracted(old["writeback"], new["writeback"]),
        "files": [_file_difference(*pair) for pair in zip(old["files"], new["files"], strict=True)],
    }
    changed["hit_rates"] = hit_rates(changed)
    return changed


def _file_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``new`` (about a file) whose counters are the differences to ``old``."""
    counters = ("reads", "bytes", "table_loads", "uncached_reads", "server")
    return {**new, **_subtracted(old, {name: new[name] for name in counters})}


def _subtracted(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``new`` with the counters of ``old`` subtracted, also those in lists and objects."""
    result: dict[str, Any] = {}
    for name, value in new.items():
        before = old[name]
        if isinstance(value, dict):
            result[name] = _subtracted(before, value)
        elif isinstance(value, list):
            result[name] = [late - early for early, late in zip(before, value, strict=True)]
        else:
            result[name] = None if value is None else value - before
    return result
