"""The layout of a disk in its image, summarised for the picture that ``qedimg map`` draws.

The file and the disk are each divided into cells of nearly equal length, and the clusters of each
cell are counted.  numpy counts a whole slice of a table in a few operations, so a full disk of 1
TiB takes about a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.tables import read_l1_table
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ENTRY_BYTES, UNALLOCATED, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.check.findings import Code
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header

    Counts = NDArray[np.int64]
    Positions = NDArray[np.float64]


@dataclass
class Layout:
    """The clusters of an image, counted by cells.

    Attributes:
        file_clusters: Number of clusters in the file; an incomplete last one counts.
        disk_clusters: Number of clusters of the disk; an incomplete last one counts.
        file_bytes: Size of the file.
        disk_bytes: Size of the disk.
        cluster_size: Bytes in a cluster.
        has_base: Whether the image has a backing file.
        tables: For each cell of the file, the number of its clusters with the header or tables.
        data: For each cell of the file, the number of its clusters with data.
        positions: For each cell of the file, where on the disk one of its data clusters lies, from
            0 (beginning) to 1 (end); 0 for a cell without data.
        disk_data: For each cell of the disk, the number of its clusters with data.
        disk_zeros: For each cell of the disk, the number of its zero clusters.
        runs: Number of runs of data: clusters that are adjacent both on the disk and in the file.
        bad: Number of invalid L1 and L2 entries within the disk.  The other numbers leave them out.
    """

    file_clusters: int
    disk_clusters: int
    file_bytes: int
    disk_bytes: int
    cluster_size: int
    has_base: bool
    tables: Counts
    data: Counts
    positions: Positions
    disk_data: Counts
    disk_zeros: Counts
    runs: int = 0
    bad: int = 0

    @property
    def data_clusters(self) -> int:
        """Number of clusters with data."""
        return int(self.data.sum())

    @property
    def table_clusters(self) -> int:
        """Number of clusters with the header or tables."""
        return int(self.tables.sum())

    @property
    def free_clusters(self) -> int:
        """Number of clusters of the file to which nothing refers."""
        return max(0, self.file_clusters - self.table_clusters - self.data_clusters)

    def cell_clusters(self, cells: int, *, of_file: bool) -> Counts:
        """Return the number of clusters in each of ``cells`` cells of the file or of the disk."""
        total = self.file_clusters if of_file else self.disk_clusters
        return np.diff(_edges(total, cells))


def _edges(total: int, cells: int) -> Counts:
    """Return the index of the first cluster of each cell, followed by ``total``."""
    # A cluster c is in the cell c * cells // total.  A disk of 0 bytes has no cell.
    if not cells:
        return np.zeros(1, np.int64)
    return -(-np.arange(cells + 1, dtype=np.int64) * total // cells)


@dataclass
class _Counter:
    """Counts clusters by cells; `Layout` describes the attributes that both classes have."""

    header: Header
    file_clusters: int
    file_cells: int
    disk_cells: int
    tables: Counts = field(init=False)
    data: Counts = field(init=False)
    positions: Positions = field(init=False)
    disk_data: Counts = field(init=False)
    disk_zeros: Counts = field(init=False)
    runs: int = 0
    bad: int = 0
    _next: tuple[int, int] = (-1, -1)  # the guest and the file cluster that would continue a run

    def __post_init__(self) -> None:
        """Begin with nothing counted."""
        self.disk_clusters = -(-self.header.image_size // self.header.cluster_size)
        self.tables = np.zeros(self.file_cells, np.int64)
        self.data = np.zeros(self.file_cells, np.int64)
        self.positions = np.zeros(self.file_cells, np.float64)
        self.disk_data = np.zeros(self.disk_cells, np.int64)
        self.disk_zeros = np.zeros(self.disk_cells, np.int64)

    def count_header(self, length: int) -> None:
        """Count the header, which has ``length`` clusters; those past the end of the file are not.

        A header can claim 2^31 clusters, so they are not listed.
        """
        edges = _edges(self.file_clusters, self.file_cells)
        self.tables += np.diff(np.minimum(edges, length))

    def count_tables(self, first: Counts, length: int) -> None:
        """Count the tables that begin at the clusters ``first``, each ``length`` clusters long."""
        clusters = (first[:, None] + np.arange(length)).ravel()
        self.tables += np.bincount(
            clusters * self.file_cells // self.file_clusters, minlength=self.file_cells
        )[: self.file_cells]

    def count_entries(self, first: int, values: Values, invalid: Mask) -> None:
        """Count the L2 entries of a slice; ``first`` is the guest cluster of the first entry."""
        cells = self.disk_cells
        self.bad += int(invalid.sum())
        zeros = np.flatnonzero(values == ZERO) + first
        self.disk_zeros += np.bincount(zeros * cells // self.disk_clusters, minlength=cells)
        found = np.flatnonzero(~invalid & (values != UNALLOCATED) & (values != ZERO))
        if not len(found):
            return
        guest = found + first
        self.disk_data += np.bincount(guest * cells // self.disk_clusters, minlength=cells)
        clusters = (values[found] // np.uint64(self.header.cluster_size)).astype(np.int64)
        cells = self.file_cells
        where = clusters * cells // self.file_clusters
        self.data += np.bincount(where, minlength=cells)
        # Each cell gets the position of one of its clusters.  The mean of distant positions could
        # be a position whose data is not in the cell.
        self.positions[where] = guest / self.disk_clusters
        breaks = (np.diff(guest) != 1) | (np.diff(clusters) != 1)
        self.runs += int(breaks.sum()) + ((int(guest[0]), int(clusters[0])) != self._next)
        self._next = (int(guest[-1]) + 1, int(clusters[-1]) + 1)


async def read_layout(
    file: HostFile,
    header: Header,
    file_cells: int,
    disk_cells: int,
    progress: Callable[[int, int], object] | None = None,
) -> Layout:
    """Read all tables of an image; return where its clusters are.

    Args:
        file: The image.
        header: The header of the image.
        file_cells: Maximum number of cells of the file; a cell has at least one cluster.
        disk_cells: Maximum number of cells of the disk; a cell has at least one cluster.
        progress: Called with the number of L2 tables read so far and in all.

    Raises:
        NeedsCheckError: The image has more than `qedfuse.check.tables.MAX_TABLES` tables.
        HostError: The host cannot read the file.
    """
    size = header.cluster_size
    file_bytes = file.size()  # another program may be extending the file
    file_clusters = max(-(-file_bytes // size), 1)
    disk_clusters = -(-header.image_size // size)
    counter = _Counter(
        header, file_clusters, min(file_cells, file_clusters), min(disk_cells, disk_clusters)
    )

    entries = header.geometry.entries
    used_tables = -(-disk_clusters // entries)

    def count_bad(_code: Code, first: int, _values: Values, mask: Mask) -> None:
        # L1 entries past the end of the disk do not count.
        counter.bad += int(mask[: max(0, used_tables - first)].sum())

    classifier = EntryClassifier(header, file_bytes)
    indices, tables = await read_l1_table(file, classifier, count_bad)
    classifier = classifier.with_tables(np.sort(tables))
    length = header.geometry.table_size
    counter.count_header(max(1, header.header_size))
    counter.count_tables(np.array([header.l1_table_offset // size], np.int64), length)
    counter.count_tables((tables // np.uint64(size)).astype(np.int64), length)
    for number, (index, table) in enumerate(zip(indices.tolist(), tables.tolist(), strict=True), 1):
        start = index * entries
        # L2 entries past the end of the disk do not count.
        wanted = max(0, min(entries, counter.disk_clusters - start)) * ENTRY_BYTES
        async for first, values in read_table(file, table, wanted):
            invalid = np.zeros(len(values), bool)
            for _code, mask in classifier.l2_errors(values):
                invalid |= mask
            counter.count_entries(start + first, values, invalid)
        if progress is not None:
            progress(number, len(tables))
    return Layout(
        file_clusters,
        disk_clusters,
        file_bytes,
        header.image_size,
        size,
        header.has_backing,
        counter.tables,
        counter.data,
        counter.positions,
        counter.disk_data,
        counter.disk_zeros,
        counter.runs,
        counter.bad,
    )
