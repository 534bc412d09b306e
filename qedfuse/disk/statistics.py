"""Statistics of an opened disk: counters and sizes.

Everything is in memory already, so this works even while the host's file system does not answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.hostio.readonlyfile import ReadOnlyFile

if TYPE_CHECKING:
    from qedfuse.disk.components import Components
    from qedfuse.disk.lookup.filereads import FileReadStatistics
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.space.scan import ScanStatistics
    from qedfuse.disk.writeback.metadata import WritebackStatistics
    from qedfuse.hostio.readonlyfile import ServerReads
    from qedfuse.util.lru import LRUStatistics


@dataclass(frozen=True, slots=True)
class FileStatistics:
    """One file of the chain.

    Attributes:
        name: The name of the file, for messages.
        is_qed: Whether the file is a QED image.
        reads: How often requests have read data of the file, and how many bytes.  Tables do not
            count.
        table_loads: How many slices of the file's tables have been read, also by the scan.
        uncached_reads: How many reads, including those of tables, have waited because the host's
            page cache did not have the data; None if this is not counted.
        server: What was fetched from the server of the file; None if there is none, or if the
            fetches are not counted.
    """

    name: str
    is_qed: bool
    reads: FileReadStatistics
    table_loads: int
    uncached_reads: int | None
    server: ServerReads | None


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """The present sizes of a disk, and what it has done since it was opened.

    Attributes:
        tables: Statistics of the table cache.
        table_loads: How many slices of tables were loaded into the table cache for requests.
        table_cache_bytes: Maximum number of bytes of the table cache
            (`qedfuse.disk.lookup.tablecache.make_store`).
        dirty_table_bytes: Length in bytes of all dirty slices of the image's tables.
        writeback: Counters of the write-back cycles.
        file_bytes: File offset in bytes where the last cluster in use ends; where the last whole
            cluster of the file ends, until the scan has ended and if the disk is read-only.
        bound_bytes: The file length in bytes that suffices for a fully allocated disk.
        cluster_bytes: Length of a cluster in bytes.
        allocated_clusters: How many clusters have been handed out, for data and for tables.
        free_clusters: How many clusters before the last one in use are free; None before the
            scan for free clusters has succeeded.
        quarantined_clusters: How many clusters have lost their reference and are not free yet.
        scan: How far the scan for free clusters is; None if the disk is open read-only.
        need_check: Whether the header in the file has NEED_CHECK set.
        files: The files of the chain, the image itself first.
    """

    tables: LRUStatistics
    table_loads: int
    table_cache_bytes: int
    dirty_table_bytes: int
    writeback: WritebackStatistics
    file_bytes: int
    bound_bytes: int
    cluster_bytes: int
    allocated_clusters: int
    free_clusters: int | None
    quarantined_clusters: int
    scan: ScanStatistics | None
    need_check: bool
    files: tuple[FileStatistics, ...]


def collect_statistics(components: Components) -> DiskStatistics:
    """Collect the statistics of a disk from its components."""
    allocator, chain = components.allocator, components.chain
    scan = components.scan.statistics()
    loads = sum(map(_table_loads, chain.layers))
    return DiskStatistics(
        tables=components.store.statistics(),
        # `scan.loaded_slices` includes slices that a request was loading while the scan waited for
        # them, so the difference can be too small.
        table_loads=max(0, loads - scan.loaded_slices),
        table_cache_bytes=components.options.cache_bytes,
        dirty_table_bytes=components.layer.tables.dirty_bytes,
        writeback=components.writeback.statistics(),
        file_bytes=allocator.end,
        bound_bytes=allocator.bound,
        cluster_bytes=1 << allocator.cluster_bits,
        allocated_clusters=allocator.handed_out,
        free_clusters=allocator.free.count if allocator.scan_complete else None,
        quarantined_clusters=components.quarantine.count,
        scan=scan if components.file.writable else None,
        need_check=components.header_store.value.need_check,
        files=tuple(map(_describe, chain.layers, chain.file_reads.statistics())),
    )


def _describe(layer: Layer, reads: FileReadStatistics) -> FileStatistics:
    """Return the statistics of the file of a layer."""
    file = layer.file
    policy = file.read_policy
    server = file.server_reads if isinstance(file, ReadOnlyFile) else None
    uncached = None if policy is None else policy.uncached
    is_qed = isinstance(layer, QedLayer)
    loads = _table_loads(layer)
    return FileStatistics(file.name, is_qed, reads, loads, uncached, server)


def _table_loads(layer: Layer) -> int:
    """Return how many slices of tables were read from the file of a layer."""
    return layer.tables.loads if isinstance(layer, QedLayer) else 0
