"""All arithmetic on offsets, in one place.

A guest offset is cut into an index into the L1 table, an index into an L2 table and an
offset in the cluster.  Everything that shifts, masks, rounds or bounds lives here, so
that it can be right once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

from qedfuse.ondisk.constants import ENTRY_BYTES, MAX_OFFSET, SECTOR

GuestOffset = NewType("GuestOffset", int)
"""A byte position on the disk that the guest sees."""

FileOffset = NewType("FileOffset", int)
"""A byte position in the image file."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an image is cut up; all sizes in bytes unless the name says otherwise.

    Attributes:
        cluster_size: Bytes in a cluster, a power of two.
        table_size: Clusters in an L1 or L2 table, a power of two.
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
        """Derive what every request needs, once."""
        put = object.__setattr__
        put(self, "cluster_bits", self.cluster_size.bit_length() - 1)
        put(self, "cluster_mask", self.cluster_size - 1)
        put(self, "table_bytes", self.table_size * self.cluster_size)
        put(self, "entries", self.table_bytes // ENTRY_BYTES)
        put(self, "table_span", self.entries * self.cluster_size)

    @property
    def max_image_size(self) -> int:
        """The largest disk that two levels of tables and the kernel can address."""
        return min(self.entries * self.table_span, MAX_OFFSET - SECTOR + 1)

    def l1_index(self, start: int) -> int:
        """Tell which L1 entry covers a guest offset."""
        return start // self.table_span

    def l2_index(self, start: int) -> int:
        """Tell which entry of its L2 table covers a guest offset."""
        return (start % self.table_span) >> self.cluster_bits

    def in_cluster(self, offset: int) -> int:
        """Give the distance of an offset, guest or file, from the start of its cluster."""
        return offset & self.cluster_mask

    def floor(self, offset: int) -> int:
        """Round an offset down to the start of its cluster."""
        return offset & ~self.cluster_mask

    def ceil(self, offset: int) -> int:
        """Round an offset up to a cluster boundary."""
        return (offset + self.cluster_mask) & ~self.cluster_mask

    def clusters(self, length: int) -> int:
        """Count the clusters that ``length`` bytes need, from a cluster boundary on."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def l1_used(self, image_size: int) -> int:
        """Count the L1 entries that a disk of ``image_size`` bytes can use."""
        return -(-image_size // self.table_span)

    def bound(self, header_end: int, image_size: int) -> int:
        """Give the length in bytes that the file never needs to exceed."""
        tables = 1 + self.l1_used(image_size)
        return header_end + tables * self.table_bytes + self.ceil(image_size)
