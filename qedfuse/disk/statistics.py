"""Statistics of an opened disk: counters and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qedfuse.disk.components import Components
    from qedfuse.disk.writeback.metadata import WritebackStatistics
    from qedfuse.util.lru import LRUStatistics


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """The present sizes of a disk, and what it has done since it was opened.

    Attributes:
        tables: Statistics of the table cache.
        writeback: Counters of the write-back cycles.
        file_bytes: File offset in bytes where the last cluster in use ends.
        bound_bytes: The file length in bytes that suffices if each cluster of the disk is
            allocated.
        free_clusters: How many clusters before the last one in use are free; None before the
            scan for free clusters has succeeded.
        quarantined_clusters: How many clusters have lost their reference and are not free yet.
    """

    tables: LRUStatistics
    writeback: WritebackStatistics
    file_bytes: int
    bound_bytes: int
    free_clusters: int | None
    quarantined_clusters: int


def collect_statistics(components: Components) -> DiskStatistics:
    """Collect the statistics of a disk from its components."""
    allocator = components.allocator
    return DiskStatistics(
        tables=components.store.statistics(),
        writeback=components.writeback.statistics(),
        file_bytes=allocator.end,
        bound_bytes=allocator.bound,
        free_clusters=allocator.free.count if allocator.scan_complete else None,
        quarantined_clusters=components.quarantine.count,
    )
