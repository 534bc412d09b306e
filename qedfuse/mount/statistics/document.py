"""The statistics of one mount as a document: values that JSON can express.

docs/stats.md describes the fields.  This module reads the counters that the components keep.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from qedfuse import __version__
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.requestcounters import BUCKETS, OPERATIONS
from qedfuse.mount.statistics.rates import hit_rates
from qedfuse.mount.statistics.version import VERSION

if TYPE_CHECKING:
    from qedfuse.disk.statistics import DiskStatistics, FileStatistics
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
    from qedfuse.mount.sandbox.sandbox import Sandbox

BUCKET_BOUNDS: Final = tuple(1e-6 * (1 << bucket) for bucket in range(BUCKETS - 1))
"""The upper bounds of the buckets of a histogram, in seconds; the last bucket has none."""

_STATM: Final = Path("/proc/self/statm")


class StatisticsSource:
    """Makes the document of one mount."""

    def __init__(
        self, disks: ExportedDisks, mountpoint: str, sandbox: Sandbox | None = None
    ) -> None:
        """Describe the disks of the mount on ``mountpoint``; the uptime counts from this call."""
        self._disks = disks
        self._mountpoint = mountpoint
        self._sandbox = sandbox
        self._start_time = time.time()
        self._begin = time.clock_gettime(time.CLOCK_BOOTTIME)

    async def document(self) -> dict[str, Any]:
        """Return the document.

        Other tasks can run between two disks, so the counters of the disks can differ in age.
        """
        disks = []
        for exported in self._disks.first_files:
            handles = sum(file.handles for file in self._disks.files_of(exported.whole_disk))
            disks.append(_describe_disk(exported, handles))
            await trio.lowlevel.checkpoint()
        return {
            "version": VERSION,
            "qedfuse": __version__,
            "mountpoint": self._mountpoint,
            "pid": os.getpid(),
            "time": time.time(),
            "start_time": self._start_time,
            # Unlike the monotonic clock, this one goes on while the machine is suspended.
            "uptime_seconds": time.clock_gettime(time.CLOCK_BOOTTIME) - self._begin,
            "resident_bytes": _resident_bytes(),
            "open_handles": self._disks.open_handles,
            "queued_reads": extraops.queued_reads(),
            "sandbox": _describe_sandbox(self._sandbox),
            "bucket_bounds_seconds": list(BUCKET_BOUNDS),
            "disks": disks,
        }


def _describe_sandbox(sandbox: Sandbox | None) -> dict[str, Any]:
    """Return the part of the document about the sandbox."""
    if sandbox is None:
        return {"mode": "off", "in_force": [], "missing": []}
    return {"mode": sandbox.mode, "in_force": sandbox.in_force, "missing": sandbox.missing}


def _resident_bytes() -> int | None:
    """Return the resident memory of the server in bytes; None if /proc does not show it."""
    try:
        # Bytes, because a text file with this encoding would import the module of its codec.
        return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _describe_disk(exported: ExportedDisk, handles: int) -> dict[str, Any]:
    """Return the part of the document about one disk, which has ``handles`` open handles."""
    disk = exported.whole_disk
    statistics = disk.statistics()
    described = {
        "name": os.fsdecode(exported.name),
        "image": statistics.files[0].name,
        "size_bytes": disk.size,
        "writable": disk.writable and not exported.read_only,
        "failure": disk.failure,
        "need_check": statistics.need_check,
        "open_handles": handles,
        "requests": {
            name: _describe_requests(exported, operation)
            for operation, name in enumerate(OPERATIONS)
        },
        **_describe_components(statistics),
        "files": _describe_files(statistics.files),
    }
    described["hit_rates"] = hit_rates(described)
    return described


def _describe_requests(exported: ExportedDisk, operation: int) -> dict[str, Any]:
    """Return the counters of one operation of a disk; ``operation`` is an index in `OPERATIONS`."""
    counted = exported.counters.statistics(operation)
    return {
        "requests": counted.requests,
        "bytes": counted.bytes,
        "errors": counted.errors,
        "fast": counted.fast,
        "seconds": counted.seconds,
        "histogram": list(counted.histogram),
    }


def _describe_components(statistics: DiskStatistics) -> dict[str, Any]:
    """Return the parts of the document about table cache, space, scan and write-back."""
    scan = statistics.scan
    return {
        "table_cache": {
            "loads": statistics.table_loads,
            "slices": statistics.tables.items,
            "bytes": statistics.tables.total_bytes,
            "limit_bytes": statistics.table_cache_bytes,
            "dirty_bytes": statistics.dirty_table_bytes,
            "evictions": statistics.tables.evictions,
        },
        "space": {
            "file_bytes": statistics.file_bytes,
            "bound_bytes": statistics.bound_bytes,
            "cluster_bytes": statistics.cluster_bytes,
            "allocated_clusters": statistics.allocated_clusters,
            "free_clusters": statistics.free_clusters,
            "quarantined_clusters": statistics.quarantined_clusters,
        },
        "scan": None
        if scan is None
        else {
            "state": scan.state,
            "tables": scan.tables,
            "scanned_tables": scan.scanned_tables,
        },
        "writeback": {
            "cycles": statistics.writeback.cycles,
            "datasyncs": statistics.writeback.datasyncs,
            "table_writes": statistics.writeback.table_writes,
        },
    }


def _describe_files(files: tuple[FileStatistics, ...]) -> list[dict[str, Any]]:
    """Return the part of the document about the files of the chain."""
    all_bytes = sum(file.reads.bytes for file in files)
    return [
        {
            "depth": depth,
            "name": file.name,
            "format": "qed" if file.is_qed else "raw",
            "reads": file.reads.reads,
            "bytes": file.reads.bytes,
            "share": file.reads.bytes / all_bytes if all_bytes else None,
            "table_loads": file.table_loads,
            "uncached_reads": file.uncached_reads,
            "server": None
            if file.server is None
            else {
                "requests": file.server.requests,
                "awaited_requests": file.server.awaited_requests,
                "bytes": file.server.bytes,
            },
        }
        for depth, file in enumerate(files)
    ]
