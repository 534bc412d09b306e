"""The check: walk from the L1 table to every data cluster, and count what refers to what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.check.entries import Layout, read_table
from qedfuse.check.findings import CheckReport, Code, Finding, Findings
from qedfuse.check.oddities import oddities
from qedfuse.check.references import References
from qedfuse.ondisk.constants import ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

_SUSPICIOUS: Final = 16
"""More leaked clusters than this, and more than are in use, suggest a wrong cluster size."""


async def check_image(file: HostFile, header: Header) -> CheckReport:
    """Check the tables of an image against each other and the file; change nothing.

    Raises:
        HostError: The host cannot read the file.
        NeedsCheckError: The file is too large to be checked in bounded memory.
    """
    walk = _Walk(file, header)
    await walk.read_l1()
    await walk.read_l2()
    return walk.report()


class _Walk:
    """One check under way."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._geometry = header.geometry
        size = file.size()
        self._layout = Layout(header, size, np.empty(0, np.uint64))
        self._clusters = size >> self._geometry.cluster_bits
        # A cluster that the end of the file cuts off counts too: an entry may point to it.
        self._references = References(self._geometry.clusters(size), file.name)
        self._tables: list[tuple[int, int]] = []  # (L1 index, file offset)
        self._findings = Findings()
        for oddity in oddities(header, size, file.name):
            self._findings.add(oddity)
        self._allocated = 0

    async def read_l1(self) -> None:
        """Find the L2 tables, and mark the clusters of all tables as used."""
        header, geometry = self._header, self._geometry
        used = geometry.l1_used(header.image_size)
        self._claim(0, header.header_end)
        self._claim(header.l1_table_offset, header.l1_end)
        async for first, values in read_table(self._file, header, header.l1_table_offset):
            good = values != 0
            for code, mask in self._layout.judge_tables(values):
                good &= ~mask
                self._bad(code, "L1 entry", first, values, mask, geometry.table_span)
            where = np.flatnonzero(good)
            self._tables += [(first + int(index), int(values[index])) for index in where]
            past = int((where + first >= used).sum())
            if past:
                text = f"{self._file.name}: L1 table: found {past} entries past the disk's end"
                self._findings.add(Finding(Code.PAST_IMAGE_SIZE, text), past)
        self._sort_out_overlaps()
        for _index, table in self._tables:
            self._claim(table, table + geometry.table_bytes)

    def _sort_out_overlaps(self) -> None:
        """Report tables that share clusters with another; the first in the L1 table stays."""
        ordered = sorted(self._tables, key=lambda item: (item[1], item[0]))
        losers = set()
        end = -1
        span = self._geometry.table_span
        for index, table in ordered:
            if table < end:
                losers.add(index)
                self._bad_one(Code.TABLE_OVERLAP, f"L1 entry {index}", table, index * span, span)
            else:
                end = table + self._geometry.table_bytes
        self._tables = [item for item in self._tables if item[0] not in losers]
        offsets = sorted(table for _index, table in self._tables)
        self._layout.tables = np.array(offsets, np.uint64)

    async def read_l2(self) -> None:
        """Check every entry of every L2 table."""
        geometry = self._geometry
        size = geometry.cluster_size
        for l1_index, table in self._tables:
            label = f"L1 entry {l1_index}: L2 entry"
            start = l1_index * geometry.table_span
            async for first, values in read_table(self._file, self._header, table):
                good = values > ZERO
                if not good.any():
                    continue
                for code, mask in self._layout.judge_clusters(values):
                    if code is not Code.L2_CUT_SHORT:
                        good &= ~mask
                    self._bad(code, label, first, values, mask, size, start)
                where = np.flatnonzero(good)
                taken = self._references.claim(values[where] >> np.uint64(geometry.cluster_bits))
                duplicates = np.zeros(len(values), np.bool_)
                duplicates[where[taken]] = True
                code = Code.DUPLICATE_CLUSTER
                self._bad(code, label, first, values, duplicates, size, start)
                self._allocated += len(where)
                self._note_past_end(l1_index, first + where)

    def _note_past_end(self, l1_index: int, indices: NDArray[np.intp]) -> None:
        """Note entries for guest offsets that the disk does not have."""
        geometry = self._geometry
        inside = self._header.image_size - l1_index * geometry.table_span
        if 0 < inside < geometry.table_span:
            past = int((indices >= geometry.clusters(inside)).sum())
            if past:
                text = (
                    f"{self._file.name}: L1 entry {l1_index}: found {past} L2 entries past the "
                    "disk's end"
                )
                self._findings.add(Finding(Code.PAST_IMAGE_SIZE, text), past)

    def _claim(self, start: int, end: int) -> None:
        """Mark a range of the file as used, as far as the file goes."""
        bits = self._geometry.cluster_bits
        last = min(end >> bits, self._geometry.clusters(self._layout.file_size))
        self._references.claim_range(start >> bits, last)

    def _bad(
        self,
        code: Code,
        label: str,
        first: int,
        values: NDArray[np.uint64],
        mask: NDArray[np.bool_],
        size: int,
        start: int = 0,
    ) -> None:
        """Report the marked entries of a slice that begins at index ``first``.

        Each entry describes ``size`` bytes of the disk; the table's first one those
        from guest offset ``start`` on.
        """
        where = np.flatnonzero(mask)
        room = self._findings.room(code)
        for place in where[:room]:
            index = first + int(place)
            where_on_disk = start + index * size
            self._bad_one(code, f"{label} {index}", int(values[place]), where_on_disk, size)
        self._findings.add_uncounted(code, len(where[room:]))

    def _bad_one(self, code: Code, label: str, value: int, start: int, size: int) -> None:
        """Report one entry."""
        text = f"{self._file.name}: {label}: found {value}, expected {self._layout.expected(code)}"
        self._findings.add(Finding(code, text, value, start, size))

    def report(self) -> CheckReport:
        """Count the leaks and sum up."""
        # The cluster that the end of the file cuts off has an owner but is no whole cluster.
        owned = self._references.count - (self._findings.counts[Code.L2_CUT_SHORT] > 0)
        leaked = max(0, self._clusters - owned)
        if leaked:
            text = (
                f"{self._file.name}: found {leaked} clusters of {self._geometry.cluster_size} "
                "bytes that nothing refers to, expected none"
            )
            self._findings.add(Finding(Code.LEAKED_CLUSTERS, text), leaked)
        if leaked > max(_SUSPICIOUS, 2 * self._allocated):
            text = (
                f"{self._file.name}: found {leaked} clusters leaked and {self._allocated} in use: "
                f"header field cluster_size ({self._geometry.cluster_size}) may be wrong"
            )
            self._findings.add(Finding(Code.MOSTLY_LEAKED, text))
        return CheckReport(
            findings=tuple(self._findings.kept),
            counts=dict(self._findings.counts),
            allocated_clusters=self._allocated,
            file_clusters=self._clusters,
        )
