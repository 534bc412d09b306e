"""Reading and validating a persistent free list (docs/format-extensions.md).

An image is untrusted input, and so is its list.  The list is used only if every checksum is right
and nothing in it contradicts the header, the file's length or the offsets of the tables.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.space.allocator import MAX_FREE_CLUSTERS
from qedfuse.errors import CorruptImageError
from qedfuse.ondisk.freelist import (
    CLUSTER_HEADER_BYTES,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_OFFSET,
    RUN_BYTES,
    BadListError,
    Descriptor,
    backing_name_covers_descriptor,
    encode_runs,
    parse_cluster_header,
    parse_descriptor,
    parse_runs,
    refuse,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.freelist import Runs
    from qedfuse.ondisk.header import Header

    Values = NDArray[np.uint64]

MAX_RUNS: Final = 1 << 20
"""Maximum number of runs in a list; reading more would take as long as scanning the tables."""

_TABLES_PER_STEP: Final = 1 << 16
"""Maximum number of tables that are compared with the runs before other tasks may run."""


@dataclass(frozen=True, slots=True)
class FreeList:
    """A list that was found valid.

    Attributes:
        runs: One row for each run of free clusters, ascending: its first cluster and its length.
        list_cluster_indices: The indices of the clusters that hold the list, ascending.
        descriptor: The content of the descriptor's sector.
    """

    runs: Runs
    list_cluster_indices: Values
    descriptor: bytes

    @property
    def clusters(self) -> int:
        """The number of clusters in all runs."""
        return int(self.runs[:, 1].sum())

    def contains(self, clusters: Values) -> NDArray[np.bool_]:
        """Return for each cluster index in ``clusters`` whether a run contains that cluster."""
        first, count = self.runs[:, 0], self.runs[:, 1]
        run = np.searchsorted(first, clusters, "right") - 1
        return (run >= 0) & (clusters - first[run] < count[run])


async def read_list(file: HostFile, header: Header, tables: Values) -> FreeList:
    """Read and validate the list of an image whose header says that it has one.

    Args:
        file: The image.
        header: The image's header.
        tables: The file offsets of all L2 tables of the image, ascending.

    Raises:
        CorruptImageError: The list is invalid, or NEED_CHECK is set; the message says why.
        HostError: The host cannot read the file.
    """
    try:
        return await _Reader(file, header, tables).read()
    except BadListError as error:
        msg = f"{file.name}: free list: {error}"
        raise CorruptImageError(msg) from error


class _Reader:
    """Reads one list."""

    def __init__(self, file: HostFile, header: Header, tables: Values) -> None:
        self._file = file
        self._header = header
        self._tables = tables
        self._size = file.size()
        self._bits = header.geometry.cluster_bits
        self._clusters = self._size >> self._bits

    async def read(self) -> FreeList:
        """Read the list and validate it."""
        if self._header.need_check:
            # A list is written only while NEED_CHECK is clear.  So a program has set NEED_CHECK
            # since.  The program may have changed the tables, so listed clusters may be in use.
            refuse(
                "header field features",
                "NEED_CHECK and the bit of the list set",
                "NEED_CHECK clear",
            )
        if backing_name_covers_descriptor(self._header):
            refuse("descriptor", "the backing file name in its bytes", "no overlap")
        sector = await self._file.pread(DESCRIPTOR_OFFSET, DESCRIPTOR_BYTES)
        descriptor = parse_descriptor(sector)
        self._check_descriptor(descriptor)
        offsets, runs_by_cluster = await self._read_chain(descriptor)
        runs = np.concatenate(runs_by_cluster)
        if zlib.crc32(encode_runs(runs)) != descriptor.list_crc:
            refuse("runs", "a wrong checksum", "the checksum in the descriptor")
        self._check_runs(runs, descriptor)
        await self._check_tables(runs)
        list_cluster_indices = np.array(offsets, np.uint64) >> np.uint64(self._bits)
        found = FreeList(runs, list_cluster_indices, bytes(sector))
        listed = found.contains(found.list_cluster_indices)
        if not listed.all():
            stray = offsets[int(np.argmin(listed))]
            refuse("list cluster", f"the cluster at {stray}, not listed as free", "a free cluster")
        return found

    def _check_descriptor(self, descriptor: Descriptor) -> None:
        """Validate the numbers in the descriptor, before they decide how much is read."""
        max_free = min(self._clusters, MAX_FREE_CLUSTERS)
        for field, found, low, high in (
            ("file_bytes", descriptor.file_bytes, self._size, self._size),
            ("runs", descriptor.runs, 1, MAX_RUNS),
            ("list_clusters", descriptor.list_clusters, 1, descriptor.runs),
            ("free_clusters", descriptor.free_clusters, descriptor.runs, max_free),
        ):
            if not low <= found <= high:
                expected = f"{low}" if low == high else f"{low} to {high}"
                if low > high:  # no value is valid
                    expected = f"at least {low} and at most {high}"
                refuse(f"descriptor {field}", found, expected)

    async def _read_chain(self, descriptor: Descriptor) -> tuple[list[int], list[Runs]]:
        """Read the list clusters; return the file offset of each, and the runs of each.

        The offsets of the list clusters must ascend, so the chain cannot be a loop.
        """
        offsets: list[int] = []
        runs_by_cluster: list[Runs] = []
        offset, previous_offset, runs_left = descriptor.first_cluster, 0, descriptor.runs
        for _ in range(descriptor.list_clusters):
            self._check_offset(offset, previous_offset)
            head = await self._file.pread(offset, CLUSTER_HEADER_BYTES)
            cluster = parse_cluster_header(head, self._header.cluster_size)
            if cluster.runs > runs_left:
                refuse("runs in a list cluster", cluster.runs, f"at most {runs_left}")
            runs_left -= cluster.runs
            length = CLUSTER_HEADER_BYTES + cluster.runs * RUN_BYTES
            runs_by_cluster.append(parse_runs(cluster, await self._file.pread(offset, length)))
            offsets.append(offset)
            previous_offset, offset = offset, cluster.next_cluster
            await trio.lowlevel.checkpoint()
        if runs_left or offset:
            found = f"{descriptor.runs - runs_left} runs and next_cluster {offset}"
            refuse("list", found, f"{descriptor.runs} runs and next_cluster 0")
        return offsets, runs_by_cluster

    def _check_offset(self, offset: int, previous_offset: int) -> None:
        """Validate the offset of a list cluster; ``previous_offset`` is 0 for the first one."""
        low = max(self._header.header_end, previous_offset + 1)
        high = self._size - self._header.cluster_size
        if self._header.geometry.in_cluster(offset) or not low <= offset <= high:
            expected = f"a multiple of {self._header.cluster_size} from {low} to {high}"
            refuse("list cluster offset", offset, expected)

    def _check_runs(self, runs: Runs, descriptor: Descriptor) -> None:
        """Validate the runs: order, positions, total length, and no overlap with the L1 table."""
        first, count = runs[:, 0], runs[:, 1]
        # For runs that begin past the end of the file, the unsigned subtraction would wrap around,
        # so they are excluded first.  A run must end before the last cluster of the file.  That
        # cluster is in use, because free clusters at the end were cut off before the list was
        # written.
        inside = first < np.uint64(self._clusters)
        inside[inside] = count[inside] < np.uint64(self._clusters) - first[inside]
        header_clusters = self._header.header_end >> self._bits
        inside &= (first >= header_clusters) & (count > 0)
        if not inside.all():
            expected = (
                f"at least one cluster, not before cluster {header_clusters}, and without cluster "
                f"{self._clusters - 1}, the file's last"
            )
            self._refuse_first(runs, ~inside, expected)
        apart = first[1:] > first[:-1] + count[:-1]
        if not apart.all():
            expected = "runs that ascend and do not touch each other"
            self._refuse_first(runs[1:], ~apart, expected)
        total = int(count.sum())
        if total != descriptor.free_clusters:
            refuse("runs", f"{total} clusters", f"{descriptor.free_clusters}")
        l1_table = np.array([self._header.l1_table_offset], np.uint64)
        self._refuse_overlap(runs, l1_table, "the L1 table")

    async def _check_tables(self, runs: Runs) -> None:
        """Validate that no L2 table overlaps a run."""
        for start in range(0, len(self._tables), _TABLES_PER_STEP):
            tables = self._tables[start : start + _TABLES_PER_STEP]
            self._refuse_overlap(runs, tables, "an L2 table")
            await trio.lowlevel.checkpoint()

    def _refuse_overlap(self, runs: Runs, tables: Values, table_name: str) -> None:
        """Refuse the list if a table at one of the file offsets ``tables`` overlaps a run."""
        first = tables >> np.uint64(self._bits)
        # For each table it is enough to examine the last run that begins before the table's end: if
        # any run overlaps the table, this run does.
        size = np.uint64(self._header.table_size)
        run = np.searchsorted(runs[:, 0], first + size, "left") - 1
        overlaps = (run >= 0) & (runs[run, 0] + runs[run, 1] > first)
        if overlaps.any():
            found = f"{table_name} at {int(tables[np.argmax(overlaps)])} among the free clusters"
            refuse("runs", found, "no table there")

    def _refuse_first(self, runs: Runs, bad: NDArray[np.bool_], expected: str) -> None:
        """Refuse the list because of the first run for which ``bad`` is True."""
        first, count = runs[np.argmax(bad)].tolist()
        refuse("runs", f"{count} clusters from cluster {first} on", expected)
