"""The statistics of a mount as text, for ``qedfuse stats`` without ``--watch``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qedfuse.cli.qedfuse.quantities import NONE, byte_count, milliseconds, percent, quantile
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def mount_text(document: Mapping[str, Any]) -> str:
    """Return the lines of text that show the statistics in a mount's document."""
    # Documents are not trusted.  Their texts are escaped here, and nowhere else.
    document = {key: _escaped(value) for key, value in document.items()}
    resident = document["resident_bytes"]
    memory = NONE if resident is None else byte_count(resident)
    process = f"process {document['pid']}, up {document['uptime_seconds']:.0f} s, memory {memory}"
    lines = [f"{document['mountpoint']}: {process}"]
    if (sandbox := document.get("sandbox")) is not None:  # earlier versions send none
        missing = f"; without {', '.join(sandbox['missing'])}" if sandbox["missing"] else ""
        parts = f": {', '.join(sandbox['in_force'])}" if sandbox["in_force"] else ""
        lines.append(f"  sandbox {sandbox['mode']}{parts}{missing}")
    for disk in document["disks"]:
        lines += _disk_lines(disk, document)
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: Any) -> Any:  # noqa: ANN401  any JSON value
    """Return a value of JSON with each text in it, keys included, as `printable` text."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return value


def _disk_lines(disk: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a disk of the mount that ``document`` describes."""
    yield (
        f"  {disk['name']}: {disk['image']}, {byte_count(disk['size_bytes'])}, "
        f"{'writable' if disk['writable'] else 'read-only'}, open handles: {disk['open_handles']}"
        f"{', NEED_CHECK' if disk['need_check'] else ''}"
    )
    if disk["failure"] is not None:
        yield f"    failed       {disk['failure']}"
    times = "".join(f" {name:>8}" for name in ("avg ms", "p50 ms", "p99 ms"))
    yield f"    {'':12} {'requests':>12} {'bytes':>12} {'errors':>8}{times}"
    for operation, counted in disk["requests"].items():
        yield f"    {operation:12} {_request_columns(counted, document)}"
    rates = disk["hit_rates"]
    shown = ", ".join(f"{name.replace('_', ' ')} {percent(rates[name])}" for name in rates)
    yield f"    {'hits %':12} {shown}"
    yield from _component_lines(disk)
    yield from _file_lines(disk)


def _request_columns(counted: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the counters of an operation, with the average and quantiles of its times."""
    requests, histogram = counted["requests"], counted["histogram"]
    bounds = document["bucket_bounds_seconds"]
    times = (
        counted["seconds"] / requests if requests else None,
        quantile(histogram, bounds, 0.5),
        quantile(histogram, bounds, 0.99),
    )
    shown = " ".join(f"{milliseconds(seconds):>8}" for seconds in times)
    size = byte_count(counted["bytes"])
    return f"{requests:>12} {size:>12} {counted['errors']:>8} {shown}"


def _component_lines(disk: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about space, tables, write-back and the scan."""
    space, tables, writeback = disk["space"], disk["table_cache"], disk["writeback"]
    cluster, free = space["cluster_bytes"], space["free_clusters"]
    yield (
        f"    {'space':12} file {byte_count(space['file_bytes'])} of at most "
        f"{byte_count(space['bound_bytes'])}; free "
        f"{'not known yet' if free is None else byte_count(free * cluster)}, in quarantine "
        f"{byte_count(space['quarantined_clusters'] * cluster)}, allocated so far "
        f"{byte_count(space['allocated_clusters'] * cluster)}"
    )
    yield (
        f"    {'tables':12} {byte_count(tables['bytes'])} of {byte_count(tables['limit_bytes'])} "
        f"in memory, {byte_count(tables['dirty_bytes'])} dirty; slices loaded {tables['loads']}, "
        f"evicted {tables['evictions']}"
    )
    yield (
        f"    {'write-back':12} cycles {writeback['cycles']}, datasyncs {writeback['datasyncs']}, "
        f"table writes {writeback['table_writes']}"
    )
    if disk["scan"] is not None:
        scan = disk["scan"]
        progress = f"{scan['scanned_tables']} of {scan['tables']} tables"
        yield f"    {'scan':12} {scan['state']}, {progress}"


def _file_lines(disk: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each file of the chain."""
    for file in disk["files"]:
        server = file["server"]
        from_server = ""
        if server is not None:
            from_server = (
                f"; from the server {byte_count(server['bytes'])}, requests {server['requests']}, "
                f"of which readers awaited {server['awaited_requests']}"
            )
        uncached = file["uncached_reads"]
        from_disk = "" if uncached is None else f", not cached {uncached}"
        title = "chain" if not file["depth"] else ""
        yield (
            f"    {title:12} {percent(file['share']):>5} % of bytes, reads {file['reads']}"
            f"{from_disk}: {file['name']} ({file['format']}){from_server}"
        )
