"""What an image itself holds, without its bases: a piece of its disk after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.extents import Kind, joined
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent

_CLUSTERS_PER_BATCH: Final = 1 << 14
"""Clusters in a piece: each may come out as an extent of its own."""


def batch_starts(disk: Disk) -> range:
    """Give the guest offsets where the pieces of a disk begin."""
    return batch_starts_of(disk.size, disk.header.geometry.cluster_size)


def batch_starts_of(size: int, cluster_size: int) -> range:
    """Return the offsets where the pieces of a disk of ``size`` bytes begin."""
    return range(0, size, _CLUSTERS_PER_BATCH * cluster_size)


async def own_extents(disk: Disk, start: int) -> list[Extent]:
    """Tell how the image stores one piece; the extents are in order and leave nothing out.

    Raises:
        CorruptImageError: A table entry is bad.
    """
    await trio.lowlevel.checkpoint()
    length = min(batch_starts(disk).step, disk.size - start)
    found = joined(await disk.chain.layers[0].lookup(start, length))
    for extent in found:
        if extent.kind is Kind.BAD:
            raise CorruptImageError(extent.reason)
    return found
