"""The limits for the file offsets in table entries, as plain numbers.

Image metadata is untrusted.  If an entry points to the header or to a table, a guest can overwrite
this metadata.  If an entry points past the end of the file, the file can later grow, and the same
cluster is then allocated for another entry.

This module does not import numpy, because loading numpy takes longer than a whole fast check or
fast map.  `qedfuse.ondisk.entryrules` applies the same limits to whole slices of a table.

Source: QEMU's QED specification, "L1 table" and "L2 tables"; `qed_check_table_offset` and
`qed_check_cluster_offset` in QEMU's driver.  QEMU does not check for overlaps with tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from qedfuse.ondisk.constants import MIN_CLUSTER_SIZE, UNALLOCATED, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qedfuse.ondisk.header import Header

RESERVED_BITS: Final = MIN_CLUSTER_SIZE - 1
"""Mask of the low bits that are zero in every valid offset."""


class EntryLimits(NamedTuple):
    """The limits for the entries of one level of tables; offsets and lengths in bytes.

    They do not cover overlaps of L2 tables with each other or with data clusters.

    Attributes:
        target: What the entries point to: L2 tables from the L1 table, clusters from L2 tables.
        target_bytes: Length of a target.
        cluster_size: Every valid offset is a multiple of the cluster size.
        header_end: Where the header ends.
        l1_start: Where the L1 table begins.
        l1_end: Where the L1 table ends.
        file_size: Length of the file.
    """

    target: Literal["table", "cluster"]
    target_bytes: int
    cluster_size: int
    header_end: int
    l1_start: int
    l1_end: int
    file_size: int

    @classmethod
    def for_l1(cls, header: Header, file_size: int) -> EntryLimits:
        """Return the limits for entries of the L1 table, which point to L2 tables."""
        return cls._of(header, file_size, "table", header.geometry.table_bytes)

    @classmethod
    def for_l2(cls, header: Header, file_size: int) -> EntryLimits:
        """Return the limits for entries of L2 tables, which point to data clusters."""
        return cls._of(header, file_size, "cluster", header.cluster_size)

    @classmethod
    def _of(
        cls, header: Header, file_size: int, target: Literal["table", "cluster"], target_bytes: int
    ) -> EntryLimits:
        return cls(
            target,
            target_bytes,
            header.cluster_size,
            header.header_end,
            header.l1_table_offset,
            header.l1_end,
            file_size,
        )

    @property
    def largest_marker(self) -> int:
        """The largest entry that is not an offset: 0 for L1, 1 (a zero cluster) for L2 tables."""
        return UNALLOCATED if self.target == "table" else ZERO

    @property
    def table_bytes(self) -> int:
        """Length of each table of the image."""
        return self.l1_end - self.l1_start

    @property
    def lowest_clear(self) -> int:
        """The first offset past the header and the L1 table.

        From there up to `highest`, each multiple of the cluster size is valid, unless its target
        overlaps an L2 table.  If there is space before the L1 table, lower offsets can be valid,
        too.
        """
        return max(self.header_end, self.l1_end)

    @property
    def highest(self) -> int:
        """The last offset whose target lies inside the file; negative if none does."""
        return self.file_size - self.target_bytes

    @property
    def before_l1(self) -> int:
        """The offset whose target ends where the L1 table begins, but at least 0."""
        return max(0, self.l1_start - self.target_bytes)

    def is_valid(self, offset: int) -> bool:
        """Return whether an entry is a valid offset; overlaps with L2 tables are not checked."""
        return (
            not offset & (self.cluster_size - 1)
            and self.header_end <= offset <= self.highest
            and not self.before_l1 < offset < self.l1_end
        )


def overlaps(tables: Iterable[int], table_bytes: int) -> Iterator[bool]:
    """Yield for each L2 table whether it overlaps a valid table that comes before it.

    A table is valid if it overlaps no earlier valid table.  An invalid table owns no clusters, so
    later tables are not compared with it.

    Args:
        tables: File offsets of the tables, in ascending order.
        table_bytes: Length of a table.
    """
    end = 0
    for table_offset in tables:
        is_overlapping = table_offset < end
        if not is_overlapping:
            end = table_offset + table_bytes
        yield is_overlapping
