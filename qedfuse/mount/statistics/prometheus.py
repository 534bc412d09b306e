"""Documents of statistics in the text format of Prometheus (version 0.0.4).

docs/stats.md lists the metrics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class _Families:
    """Metric families, in the order in which their first samples were added."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(
        self, name: str, kind: str, meaning: str, value: float | None, labels: Mapping[str, object]
    ) -> None:
        """Add a sample that has the name of its family; do nothing if ``value`` is None."""
        if value is not None:
            self.add_to(name, kind, meaning, name, value, labels)

    def add_to(
        self,
        family: str,
        kind: str,
        meaning: str,
        name: str,
        value: float,
        labels: Mapping[str, object],
    ) -> None:
        """Add a sample whose name can differ from the name of its family, as in a histogram.

        ``kind`` is the type of the family, and ``meaning`` its help text.
        """
        lines = self._families.setdefault(
            family, [f"# HELP {family} {meaning}\n# TYPE {family} {kind}\n"]
        )
        shown = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
        lines.append(f"{name}{{{shown}}} {_number(value)}\n")

    def text(self) -> str:
        """Return all families."""
        return "".join(line for lines in self._families.values() for line in lines)


def exposition(documents: Iterable[Mapping[str, Any]]) -> str:
    """Return the metrics of mounts; ``documents`` has one document of statistics for each mount."""
    families = _Families()
    for document in documents:
        mount = {"mountpoint": printable(document["mountpoint"])}
        for name, kind, meaning, value in _of_mount(document):
            families.add(f"qedfuse_{name}", kind, meaning, value, mount)
        families.add(
            *("qedfuse_build_info", "gauge", "1; the version is a label.", 1),
            {**mount, "version": printable(document["qedfuse"])},
        )
        for disk in document["disks"]:
            labels = {**mount, "disk": printable(disk["name"])}
            _add_requests(families, document["bucket_bounds_seconds"], disk, labels)
            for name, kind, meaning, value in _of_disk(disk):
                families.add(f"qedfuse_{name}", kind, meaning, value, labels)
            _add_files(families, disk["files"], labels)
    return families.text()


def _of_mount(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float | None]]:
    """Yield name, type, meaning and value of each metric that has one value for a mount."""
    # A server of an earlier version does not report the start.  The difference changes a little
    # with each answer, and Prometheus takes a changed start for a restart.
    start = document.get("start_time", document["time"] - document["uptime_seconds"])
    yield "start_time_seconds", "gauge", "When the mount began, in Unix time.", start
    resident = document["resident_bytes"]
    yield "resident_memory_bytes", "gauge", "Memory that the server takes.", resident
    handles = document["open_handles"]
    yield "open_handles", "gauge", "Open handles of all disks of the mount.", handles
    # A server of an earlier version does not report the sandbox.
    if (sandbox := document.get("sandbox")) is not None:
        is_complete = sandbox["mode"] != "off" and not sandbox["missing"]
        meaning = "1 if the server is in a sandbox and all its parts are in force."
        yield "sandbox_complete", "gauge", meaning, is_complete


def _of_disk(disk: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float | None]]:
    """Yield name, type, meaning and value of each metric that has one value for a disk."""
    tables, space, scan = disk["table_cache"], disk["space"], disk["scan"]
    cluster, free = space["cluster_bytes"], space["free_clusters"]
    yield "disk_size_bytes", "gauge", "Size of the disk.", disk["size_bytes"]
    yield (
        "disk_failed",
        "gauge",
        "1 if an error has made the disk read-only.",
        (disk["failure"] is not None),
    )
    yield "need_check", "gauge", "1 if NEED_CHECK is set in the image.", disk["need_check"]
    yield (
        "table_cache_loads_total",
        "counter",
        "Slices of tables that were read from files.",
        (tables["loads"]),
    )
    yield (
        "table_cache_evictions_total",
        "counter",
        "Slices of tables that were evicted.",
        (tables["evictions"]),
    )
    yield "table_cache_bytes", "gauge", "Memory that the table cache takes.", tables["bytes"]
    yield "table_cache_limit_bytes", "gauge", "The option cache_size.", tables["limit_bytes"]
    yield (
        "table_cache_dirty_bytes",
        "gauge",
        "Tables that are not in the file yet.",
        (tables["dirty_bytes"]),
    )
    yield "image_file_bytes", "gauge", "Where the last cluster in use ends.", space["file_bytes"]
    yield (
        "image_bound_bytes",
        "gauge",
        "The length up to which a guest can make the file grow.",
        (space["bound_bytes"]),
    )
    yield (
        "image_free_bytes",
        "gauge",
        "Free clusters in the file; missing before the scan has ended.",
        (None if free is None else free * cluster),
    )
    yield (
        "image_quarantined_bytes",
        "gauge",
        "Clusters that become free after a flush.",
        (space["quarantined_clusters"] * cluster),
    )
    yield (
        "allocated_bytes_total",
        "counter",
        "Clusters that were allocated, tables included.",
        (space["allocated_clusters"] * cluster),
    )
    if scan is not None:
        yield (
            "scan_tables",
            "gauge",
            "L2 tables that the scan reads.",
            scan["tables"],
        )
        yield "scan_scanned_tables", "gauge", "L2 tables that were scanned.", scan["scanned_tables"]
        yield (
            "scan_complete",
            "gauge",
            "1 if all free clusters are known.",
            (scan["state"] == "complete"),
        )
    for name, value in disk["writeback"].items():
        yield f"writeback_{name}_total", "counter", _WRITEBACK_MEANINGS[name], value


_WRITEBACK_MEANINGS: Final = {
    "cycles": "Write-back cycles, which make changes durable.",
    "datasyncs": "Calls of fdatasync in write-back cycles.",
    "table_writes": "Writes of parts of tables in write-back cycles.",
}


def _add_requests(
    families: _Families, bounds: Sequence[float], disk: Mapping[str, Any], labels: Mapping[str, str]
) -> None:
    """Add the metrics of the requests of a disk."""
    for operation, counted in disk["requests"].items():
        of_operation = {**labels, "operation": operation}
        for key, name, meaning in (
            ("requests", "qedfuse_requests_total", "Requests that were answered."),
            ("bytes", "qedfuse_request_bytes_total", "Bytes of the successful requests."),
            ("errors", "qedfuse_request_errors_total", "Requests answered with an error."),
            ("fast", "qedfuse_fast_requests_total", "Requests answered without waiting."),
        ):
            families.add(name, "counter", meaning, counted[key], of_operation)
        family = "qedfuse_request_duration_seconds"
        meaning = "Time from the receipt of a request until its answer."
        cumulative = 0
        for bound, count in zip([*bounds, float("inf")], counted["histogram"], strict=True):
            cumulative += count
            bucket = {**of_operation, "le": "+Inf" if bound == float("inf") else repr(bound)}
            families.add_to(*(family, "histogram", meaning, f"{family}_bucket", cumulative, bucket))
        for suffix, value in (("sum", counted["seconds"]), ("count", cumulative)):
            families.add_to(
                *(family, "histogram", meaning, f"{family}_{suffix}", value, of_operation)
            )


def _add_files(
    families: _Families, files: Iterable[Mapping[str, Any]], labels: Mapping[str, str]
) -> None:
    """Add the metrics of the files of a chain."""
    for file in files:
        of_file = {**labels, "depth": file["depth"], "file": printable(file["name"])}
        server = file["server"] or {}
        for name, meaning, value in (
            ("file_reads", "Reads of data in a file of the chain.", file["reads"]),
            ("file_read_bytes", "Bytes of data read in a file of the chain.", file["bytes"]),
            (
                "file_uncached_reads",
                "Reads that the host's page cache could not answer.",
                file["uncached_reads"],
            ),
            ("server_requests", "Requests that a server has answered.", server.get("requests")),
            (
                "server_awaited_requests",
                "Requests to a server for which a reader waited.",
                server.get("awaited_requests"),
            ),
            ("server_received_bytes", "Bytes that a server has sent.", server.get("bytes")),
        ):
            families.add(f"qedfuse_{name}_total", "counter", meaning, value, of_file)


def _number(value: float) -> str:
    """Return the value of a sample as text; a boolean becomes 0 or 1."""
    return str(int(value)) if isinstance(value, int) else repr(value)


def _escaped(value: object) -> str:
    """Return the value of a label as text, escaped for use between quotes."""
    return str(value).translate(_ESCAPES)
