"""Arithmetic on offsets: indices into tables, rounding to clusters, maximum lengths.

A guest offset consists of an index into the L1 table, an index into an L2 table and an offset in
the cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from qedfuse.ondisk.constants import (
    ENTRY_BYTES,
    MAX_CLUSTER_SIZE,
    MAX_OFFSET,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    SECTOR,
)

SIZE_LIMITS: Final = {
    "cluster_size": (MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE),
    "table_size": (MIN_TABLE_SIZE, MAX_TABLE_SIZE),
}
"""Minimum and maximum of the sizes: bytes in a cluster, clusters in a table."""


def expected_size(field_name: str, value: int) -> str | None:
    """Return what a field of `SIZE_LIMITS` must be, for a message; None if ``value`` is valid."""
    minimum, maximum = SIZE_LIMITS[field_name]
    if minimum <= value <= maximum and not value & (value - 1):
        return None
    return f"a power of two from {minimum} to {maximum}"


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of clusters and tables of an image.

    Attributes:
        cluster_size: Bytes in a cluster, a power of two.
        table_size: Clusters in an L1 or L2 table, a power of two.
        cluster_bits: Binary logarithm of the cluster size.
        cluster_mask: Mask of the bits of an offset that give its position in the cluster.
        entries: Entries in a table.
        table_bytes: Bytes in a table.
        table_span: Guest bytes that one L2 table covers.
    """

    cluster_size: int
    table_size: int
    cluster_bits: int = field(init=False, repr=False)
    cluster_mask: int = field(init=False, repr=False)
    entries: int = field(init=False, repr=False)
    table_bytes: int = field(init=False, repr=False)
    table_span: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Compute the values that every request needs."""
        put = object.__setattr__
        put(self, "cluster_bits", self.cluster_size.bit_length() - 1)
        put(self, "cluster_mask", self.cluster_size - 1)
        put(self, "table_bytes", self.table_size * self.cluster_size)
        put(self, "entries", self.table_bytes // ENTRY_BYTES)
        put(self, "table_span", self.entries * self.cluster_size)

    @property
    def max_image_size(self) -> int:
        """The size in bytes of the largest disk that the tables and the kernel can address."""
        return min(self.entries * self.table_span, MAX_OFFSET - SECTOR + 1)

    def l1_index(self, start: int) -> int:
        """Return the index of the L1 entry that covers a guest offset."""
        return start // self.table_span

    def l2_index(self, start: int) -> int:
        """Return the index, in the L2 table, of the entry that covers a guest offset."""
        return (start % self.table_span) >> self.cluster_bits

    def in_cluster(self, offset: int) -> int:
        """Return the distance of an offset, guest or file, from the start of its cluster."""
        return offset & self.cluster_mask

    def floor(self, offset: int) -> int:
        """Round an offset down to the start of its cluster."""
        return offset & ~self.cluster_mask

    def ceil(self, offset: int) -> int:
        """Round an offset up to a cluster boundary."""
        return (offset + self.cluster_mask) & ~self.cluster_mask

    def clusters(self, length: int) -> int:
        """Return how many clusters hold ``length`` bytes that begin at a cluster boundary."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def l1_used(self, image_size: int) -> int:
        """Return the number of L1 entries that cover a disk of ``image_size`` bytes."""
        return -(-image_size // self.table_span)

    def bound(self, header_end: int, image_size: int) -> int:
        """Return the bound of an image file: its length in bytes if every cluster is allocated."""
        tables = 1 + self.l1_used(image_size)
        return header_end + tables * self.table_bytes + self.ceil(image_size)
