"""The table of ``qedfuse stats --watch``: what each disk does per second, like ``iostat -x``."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final, NoReturn

from rich.console import Console, Group
from rich.table import Table

from qedfuse.cli.qedfuse.quantities import NONE, byte_count, milliseconds, percent, quantile
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from qedfuse.cli.qedfuse.intervals import Interval

_MEGABYTE: Final = 1e6
_RATES: Final = (
    *("r/s", "rMB/s", "r_await", "r_p99", "w/s", "wMB/s", "w_await", "w_p99", "f/s", "f_await"),
    *("d/s", "aqu-sz", "err/s", "%fast", "%table", "%host", "%remote"),
)
"""The columns of the first table after the name of the disk; docs/stats.md explains them."""
_STATE: Final = (
    *("file", "%bound", "free", "quarantine", "alloc/s", "dirty", "cycles/s", "scan"),
    *("state", "reads by file (%)"),
)
"""The columns of the second table after the name of the disk."""


class StdoutConsole(Console):
    """The console of stdout, which raises BrokenPipeError if the reader has gone."""

    def __init__(self, width: int | None = None) -> None:
        """Print to stdout; without ``width`` rich determines the width of the terminal."""
        super().__init__(width=width, markup=False, emoji=False)

    def on_broken_pipe(self) -> NoReturn:
        """Raise BrokenPipeError, which rich has caught; rich itself would exit with code 1."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def render(mounts: Iterable[tuple[Mapping[str, Any], Sequence[Interval]]]) -> RenderableType:
    """Return a line for each mount, and two tables with a row for each disk.

    ``mounts`` has for each mount its statistics as a JSON document, and the intervals of its disks.
    """
    rates, states = _table(_RATES), _table(_STATE)
    titles = []
    for document, found in mounts:
        mountpoint = printable(document["mountpoint"])
        resident = document["resident_bytes"]
        memory = NONE if resident is None else byte_count(resident)
        titles.append(printable(f"{mountpoint}: process {document['pid']}, memory {memory}"))
        for interval in found:
            name = f"{mountpoint}/{printable(interval.disk['name'])}"
            rates.add_row(name, *_rate_cells(interval, document["bucket_bounds_seconds"]))
            states.add_row(name, *map(printable, _state_cells(interval)))
    return Group(*titles, rates, states)


def _table(columns: Iterable[str]) -> Table:
    """Return an empty table whose first column is the disk."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("disk", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _rate_cells(interval: Interval, bounds: Sequence[float]) -> list[str]:
    """Return the cells of the first table for a disk."""
    requests, hits = interval.disk["requests"], interval.disk["hit_rates"]
    cells = []
    for operation in ("read", "write"):
        slow = quantile(requests[operation]["histogram"], bounds, 0.99)
        cells += [
            f"{interval.rate(operation):.0f}",
            f"{interval.rate(operation, 'bytes') / _MEGABYTE:.1f}",
            milliseconds(interval.average(operation)),
            milliseconds(slow),
        ]
    return [
        *cells,
        f"{interval.rate('flush'):.0f}",
        milliseconds(interval.average("flush")),
        f"{interval.rate('discard'):.0f}",
        f"{interval.queue_length:.2f}",
        f"{interval.errors:.0f}",
        *(percent(hits[name]) for name in ("fast_path", "table_cache", "host_cache")),
        percent(hits["remote_cache"]),
    ]


def _state_cells(interval: Interval) -> list[str]:
    """Return the cells of the second table for a disk."""
    disk, space = interval.disk, interval.disk["space"]
    cluster, free, scan = space["cluster_bytes"], space["free_clusters"], disk["scan"]
    all_bytes = sum(file["bytes"] for file in disk["files"])
    shares = [f"{file['bytes'] / all_bytes * 100:.0f}" for file in disk["files"] if all_bytes]
    is_scanning = scan is not None and scan["state"] == "running"
    progress = f"{scan['scanned_tables']}/{scan['tables']}" if is_scanning else ""
    flags = [
        "failed" if disk["failure"] is not None else "ro" if not disk["writable"] else "rw",
        *(["NEED_CHECK"] if disk["need_check"] else []),
    ]
    return [
        byte_count(space["file_bytes"]),
        percent(space["file_bytes"] / space["bound_bytes"]),
        NONE if free is None else byte_count(free * cluster),
        byte_count(space["quarantined_clusters"] * cluster),
        byte_count(space["allocated_clusters"] * cluster / interval.seconds),
        byte_count(disk["table_cache"]["dirty_bytes"]),
        f"{disk['writeback']['cycles'] / interval.seconds:.1f}",
        NONE if scan is None else progress or scan["state"],
        ",".join(flags),
        " ".join(shares) or NONE,
    ]
