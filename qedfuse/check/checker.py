"""The check: read all tables, and find the owner of each cluster of the file.

The header and the tables own the clusters in which they lie.  A table entry owns its data cluster,
and the free list owns the clusters that it lists.  A second owner of a cluster is an error.  A
cluster without an owner is leaked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.findings import CheckReport, Code, Finding, FindingCollector
from qedfuse.check.headernotes import header_notes
from qedfuse.check.tables import overlapping, read_l1_table
from qedfuse.disk.space.l2tables import claim_tables, holding_data
from qedfuse.disk.space.ownerbitmap import OwnerBitmap
from qedfuse.disk.state.freelistreader import read_list
from qedfuse.disk.state.freelistruns import expand_runs
from qedfuse.errors import CorruptImageError
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.state.freelistreader import FreeList
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header
    from qedfuse.util.backgroundtasks import Progress

_MAX_PLAUSIBLE_LEAKS: Final = 16
"""More leaked clusters than this may mean that the header is wrong; see `_Checker.report`."""

_MAX_RUNS_SHOWN: Final = 3
"""Maximum number of runs that the message about leaked clusters lists."""

_RUNS_PER_STEP: Final = 1 << 12
"""Maximum number of runs of the free list that are marked before other tasks run."""

_MAX_BATCHED_RUN_CLUSTERS: Final = 64
"""Runs of the free list up to this length are marked together, longer ones one by one."""


async def check_image(
    file: HostFile, header: Header, progress: Progress | None = None
) -> CheckReport:
    """Check the header, the tables and the free list of an image; change nothing.

    Args:
        file: The image.
        header: The header of the image.
        progress: Called before each L2 table is read, with the number of L2 tables read so far and
            the number in all.

    Raises:
        HostError: The host cannot read the file.
        NeedsCheckError: The image is too large to be checked in bounded memory.
    """
    checker = _Checker(file, header)
    await checker.read_l1()
    await checker.read_free_list()
    await checker.read_l2(progress or (lambda _done, _total: None))
    await checker.claim_free_list()
    return checker.report()


class _Checker:
    """One check of one image, in the steps of `check_image`."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        size = file.size()
        self._classifier = EntryClassifier(header, size)
        self._clusters = size >> self._geometry.cluster_bits
        # An entry may point to a cluster that the end of the file cuts short, so the bitmap
        # includes it.
        self._owners = OwnerBitmap(self._geometry.clusters(size), file.name)
        # L1 indices and file offsets of the L2 tables to read, in the order of the disk.
        self._tables = (np.empty(0, np.int64), np.empty(0, np.uint64))
        self._free_list: FreeList | None = None
        # Number of clusters of the free list to which entries refer.
        self._contradicted_clusters = 0
        # Number of clusters of the free list that count as owned, but are not marked in `_owners`.
        self._unclaimed_clusters = 0
        self._findings = FindingCollector()
        for note in header_notes(header, size, file.name):
            self._findings.add(note)
        self._allocated_clusters = 0
        self._past_end_clusters = 0
        self._fragmented_clusters = 0

    async def read_l1(self) -> None:
        """Find the L2 tables, and mark the clusters of the header and of the tables as owned.

        A table that overlaps an earlier one is reported, and neither marked nor read.  A table that
        is a hole of the file is marked, but not read: all its entries are 0.
        """
        header, geometry = self._header, self._geometry
        bits = geometry.cluster_bits
        self._owners.claim_range(0, header.header_end >> bits)
        self._owners.claim_range(header.l1_table_offset >> bits, header.l1_end >> bits)
        indices, tables = await read_l1_table(self._file, self._classifier, self._report_l1_entries)
        past_end = int((indices >= geometry.l1_used(header.image_size)).sum())
        if past_end:
            text = f"{self._file.name}: L1 table: found {past_end} entries past the disk's end"
            self._findings.add(Finding(Code.PAST_IMAGE_SIZE, text), past_end)
        order = np.lexsort((indices, tables))
        indices, tables = indices[order], tables[order]
        overlap = await overlapping(tables, geometry.table_bytes)
        self._report_overlaps(indices[overlap], tables[overlap])
        indices, tables = indices[~overlap], tables[~overlap]
        self._classifier = self._classifier.with_tables(tables)
        await claim_tables(self._owners, tables, geometry)
        has_data = await holding_data(self._file, tables, geometry.table_bytes)
        indices, tables = indices[has_data], tables[has_data]
        # In the order of the disk.  So if two entries refer to one cluster, the entry with the
        # lower guest offset is the owner, and the other entry is the duplicate.
        order = np.argsort(indices)
        self._tables = (indices[order], tables[order])

    def _report_l1_entries(
        self, code: Code, first: int, values: NDArray[np.uint64], mask: NDArray[np.bool_]
    ) -> None:
        """Report the entries of a slice of the L1 table for which ``mask`` is True."""
        self._report_entries(code, "L1 entry", first, values, mask, self._geometry.table_span)

    def _report_overlaps(self, indices: NDArray[np.int64], tables: NDArray[np.uint64]) -> None:
        """Report L2 tables, each of which overlaps a table before it in the file."""
        code, span = Code.TABLE_OVERLAP, self._geometry.table_span
        remaining = self._findings.remaining(code)
        kept = zip(indices[:remaining].tolist(), tables[:remaining].tolist(), strict=True)
        for index, table in kept:
            self._report_entry(code, f"L1 entry {index}", table, index * span, span)
        self._findings.count_only(code, len(indices[remaining:]))

    async def read_free_list(self) -> None:
        """Read the free list, if any; report it if it is invalid."""
        if self._header.has_free_list:
            try:
                tables = self._classifier.tables
                self._free_list = await read_list(self._file, self._header, tables)
            except CorruptImageError as error:
                self._findings.add(Finding(Code.FREE_LIST_BAD, str(error)))

    async def claim_free_list(self) -> None:
        """Mark the clusters of the free list as owned, so that they do not count as leaked.

        Must follow `read_l2`.  Otherwise an entry that refers to a listed cluster would be reported
        twice: as a duplicate, and because it contradicts the free list.
        """
        if self._free_list is None:
            return
        if self._owners.is_limited:
            # Marking might exceed the limit of `OwnerBitmap`, so the clusters are only counted.
            # Those to which entries refer are marked already.
            self._unclaimed_clusters = self._free_list.clusters - self._contradicted_clusters
            return
        for start in range(0, len(self._free_list.runs), _RUNS_PER_STEP):
            runs = self._free_list.runs[start : start + _RUNS_PER_STEP]
            is_short = runs[:, 1] <= _MAX_BATCHED_RUN_CLUSTERS
            self._owners.claim(expand_runs(runs[is_short]))
            for first, count in runs[~is_short].tolist():
                self._owners.claim_range(first, first + count)
            await trio.lowlevel.checkpoint()

    async def read_l2(self, progress: Progress) -> None:
        """Check every entry of the L2 tables that `read_l1` has found."""
        geometry = self._geometry
        cluster_size = geometry.cluster_size
        tables = zip(*map(np.ndarray.tolist, self._tables), strict=True)
        for done, (l1_index, table) in enumerate(tables):
            progress(done, len(self._tables[0]))
            label = f"L1 entry {l1_index}: L2 entry"
            start = l1_index * geometry.table_span
            next_offset = 0
            async for first, values in read_table(self._file, table, geometry.table_bytes):
                refers = values > ZERO
                if not refers.any():
                    continue
                next_offset = self._count_fragments(values[refers], next_offset)
                for code, mask in self._classifier.l2_errors(values):
                    # An entry whose cluster is cut short still refers to that cluster.
                    if code is not Code.L2_CUT_SHORT:
                        refers &= ~mask
                    self._report_entries(code, label, first, values, mask, cluster_size, start)
                where = np.flatnonzero(refers)
                had_owner = self._owners.claim(values[where] >> np.uint64(geometry.cluster_bits))
                duplicates = np.zeros(len(values), np.bool_)
                duplicates[where[had_owner]] = True
                code = Code.DUPLICATE_CLUSTER
                self._report_entries(code, label, first, values, duplicates, cluster_size, start)
                self._report_listed_entries(label, first, values, refers, duplicates, start)
                self._allocated_clusters += len(where)
                self._count_past_end(l1_index, first + where)

    def _count_fragments(self, values: NDArray[np.uint64], next_offset: int) -> int:
        """Count the clusters that do not begin where the one before ends.

        Args:
            values: The L2 entries of a slice that have an offset, valid or not; not empty.
            next_offset: The offset at which the last cluster of the table's earlier slices ends; 0
                if these slices have no clusters.

        Returns:
            The offset at which the last cluster ends.
        """
        size = np.uint64(self._geometry.cluster_size)
        self._fragmented_clusters += int(np.count_nonzero(values[1:] - values[:-1] != size))
        self._fragmented_clusters += next_offset > 0 and int(values[0]) != next_offset
        return int(values[-1]) + int(size)

    def _report_listed_entries(
        self,
        label: str,
        first: int,
        values: NDArray[np.uint64],
        refers: NDArray[np.bool_],
        duplicates: NDArray[np.bool_],
        start: int,
    ) -> None:
        """Report the entries that refer to a cluster of the free list, and count these clusters.

        ``refers`` are the entries that refer to a cluster, and ``duplicates`` those whose cluster
        had an owner before.  `_report_entries` describes the other arguments.
        """
        if self._free_list is not None:
            clusters = values >> np.uint64(self._geometry.cluster_bits)
            mask = refers & self._free_list.contains(clusters)
            self._contradicted_clusters += int((mask & ~duplicates).sum())
            size = self._geometry.cluster_size
            self._report_entries(
                Code.FREE_LIST_CONTRADICTED, label, first, values, mask, size, start
            )

    def _count_past_end(self, l1_index: int, indices: NDArray[np.intp]) -> None:
        """Count and report those of the given L2 entries that lie past the end of the disk.

        If the whole table is past the end, `read_l1` has reported it, so this method only counts.
        """
        geometry = self._geometry
        bytes_inside = self._header.image_size - l1_index * geometry.table_span
        if bytes_inside < geometry.table_span:
            past_end = int((indices >= geometry.clusters(max(0, bytes_inside))).sum())
            self._past_end_clusters += past_end
            if past_end and bytes_inside > 0:
                text = (
                    f"{self._file.name}: L1 entry {l1_index}: found {past_end} L2 entries past the "
                    "disk's end"
                )
                self._findings.add(Finding(Code.PAST_IMAGE_SIZE, text), past_end)

    def _report_entries(
        self,
        code: Code,
        label: str,
        first: int,
        values: NDArray[np.uint64],
        mask: NDArray[np.bool_],
        size: int,
        start: int = 0,
    ) -> None:
        """Report the entries of a slice for which ``mask`` is True.

        Args:
            code: The error.
            label: The words that precede the index of an entry in messages.
            first: Index, in the table, of the first entry of the slice.
            values: The entries of the slice.
            mask: Which entries of the slice have the error.
            size: Number of bytes of the disk that each entry describes.
            start: Guest offset that the first entry of the table describes.
        """
        where = np.flatnonzero(mask)
        remaining = self._findings.remaining(code)
        for at in where[:remaining].tolist():
            index = first + at
            guest_start = start + index * size
            self._report_entry(code, f"{label} {index}", int(values[at]), guest_start, size)
        self._findings.count_only(code, len(where[remaining:]))

    def _report_entry(self, code: Code, label: str, value: int, start: int, size: int) -> None:
        """Report an error in an entry for ``size`` bytes from the guest offset ``start`` on."""
        text = (
            f"{self._file.name}: {label}: found {value}, expected {self._classifier.expected(code)}"
        )
        self._findings.add(Finding(code, text, value, start, size))

    def report(self) -> CheckReport:
        """Count the leaked clusters, and return the report of the whole check."""
        # `_owners.count` includes a cluster that the end of the file cuts short, if an entry points
        # to it.  `_clusters` counts whole clusters only.
        owned = self._owners.count - (self._findings.counts[Code.L2_CUT_SHORT] > 0)
        leaked = max(0, self._clusters - owned - self._unclaimed_clusters)
        if leaked:
            size = self._geometry.cluster_size
            text = (
                f"{self._file.name}: found {leaked} clusters of {size} bytes that nothing refers "
                "to, expected none"
            )
            first_offset = None
            # If clusters of the free list are not marked, `free_runs` would return them as leaked.
            if not self._unclaimed_clusters:
                runs = self._owners.free_runs(self._clusters, _MAX_RUNS_SHOWN)
                shown = ", ".join(f"{count} at {first * size}" for first, count in runs)
                text += f" (the first: {shown})"
                first_offset = runs[0][0] * size
            self._findings.add(Finding(Code.LEAKED_CLUSTERS, text, first_offset), leaked)
        if leaked > max(_MAX_PLAUSIBLE_LEAKS, 2 * self._allocated_clusters):
            text = (
                f"{self._file.name}: found {leaked} clusters leaked and "
                f"{self._allocated_clusters} in use: "
                f"header field cluster_size ({self._geometry.cluster_size}) may be wrong"
            )
            self._findings.add(Finding(Code.MOSTLY_LEAKED, text))
        return CheckReport(
            findings=tuple(self._findings.findings),
            counts=dict(self._findings.counts),
            allocated_clusters=self._allocated_clusters,
            file_clusters=self._clusters,
            listed_clusters=None if self._free_list is None else self._free_list.clusters,
            fragmented_clusters=self._fragmented_clusters,
            past_end_clusters=self._past_end_clusters,
            hidden_findings=self._findings.hidden,
        )
