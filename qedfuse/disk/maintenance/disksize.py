"""The size of a disk: the rules for a new size, a lock, and the change in the header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import SECTOR

if TYPE_CHECKING:
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback

_MAX_CLUSTERS_PER_LOOKUP: Final = 1024
"""Maximum number of clusters of a table that are looked up between two checkpoints."""


class DiskSize:
    """The size of one disk.

    Attributes:
        lock: Held while the size changes, and by tasks that need the size to stay the same.
    """

    def __init__(
        self,
        layer: QedLayer,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        allocator: Allocator,
    ) -> None:
        """Manage the size of the disk whose top image is ``layer``."""
        self._layer = layer
        self._header_store = header_store
        self._writeback = writeback
        self._allocator = allocator
        self.lock = trio.Lock()

    def check(self, size: int, *, shrink: bool = False) -> None:
        """Raise if ``size`` is not valid as the new size of the disk.

        Args:
            size: The new size in bytes.
            shrink: Whether the disk will shrink instead of grow.

        Raises:
            UsageError: ``size`` shrinks the disk without ``shrink``, or grows it with ``shrink``.
                Or it is not a multiple of 512, is negative, or is more than the tables can address.
        """
        name, old, max_size = (
            self._layer.file.name,
            self._layer.size,
            self._layer.geometry.max_image_size,
        )
        if shrink and size > old:
            msg = f"{name}: size: found {size}, expected at most {old}, the present size"
            raise UsageError(msg)
        if size < old and not shrink:
            msg = f"{name}: size: found {size}, expected at least {old}, the present size"
            raise UsageError(msg)
        if size % SECTOR or not 0 <= size <= max_size:
            msg = f"{name}: size: found {size}, expected a multiple of {SECTOR} up to {max_size}"
            raise UsageError(msg)

    async def change(self, size: int) -> None:
        """Write ``size``, in bytes, durably into the header, and give the disk this size.

        The caller must hold `lock`.

        Raises:
            HostError: A system call failed; the disk has its old size.
        """
        await self._header_store.change(
            lambda header: header.with_size(size), barrier=self._writeback.barrier
        )
        self._layer.set_header(self._header_store.value)
        self._allocator.set_size(self._header_store.value)


async def first_in_use(layer: QedLayer, start: int, end: int) -> Extent | None:
    """Return the first extent of data, or of a bad entry, in a guest range; None without one.

    The range may lie past the end of the disk.

    Args:
        layer: The image.
        start: Guest offset of the first byte.
        end: Guest offset just past the last byte.

    Raises:
        HostError: The host cannot read a table.
    """
    geometry = layer.geometry
    while start < end:
        # If the table is missing, its whole range is one extent.  A lookup in an existing table
        # returns one extent for each scattered cluster.  The extents of a whole table would delay
        # other tasks too long, so such a lookup covers only a part of the table's range.
        table, reason = await layer.table_at(geometry.l1_index(start))
        step = geometry.table_span
        if table or reason:
            step = min(step, _MAX_CLUSTERS_PER_LOOKUP * geometry.cluster_size)
        stop = min(end, start - start % step + step)
        for extent in await layer.lookup(start, stop - start):
            if extent.kind in (Kind.DATA, Kind.BAD):
                return extent
        start = stop
        await trio.lowlevel.checkpoint()
    return None
