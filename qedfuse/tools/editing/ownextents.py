"""The ranges that an image itself stores, without its bases, as batches of extents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.extents import Kind, joined
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent

_CLUSTERS_PER_BATCH: Final = 1 << 14
"""Number of clusters in a batch; only the last batch of a disk may have fewer."""


def batch_starts(size: int, cluster_size: int) -> range:
    """Return the guest offsets at which the batches of a disk of ``size`` bytes begin."""
    return range(0, size, _CLUSTERS_PER_BATCH * cluster_size)


async def own_extents(disk: Disk, start: int) -> list[Extent]:
    """Return how the image stores one batch, as extents in order and without gaps.

    Args:
        disk: The open image.
        start: Guest offset where the batch begins, one of `batch_starts`.

    Raises:
        CorruptImageError: A table entry is bad.
        HostError: The host cannot read a table.
    """
    await trio.lowlevel.checkpoint()
    step = batch_starts(disk.size, disk.header.geometry.cluster_size).step
    length = min(step, disk.size - start)
    extents = joined(await disk.chain.layers[0].lookup(start, length))
    refuse_bad(extents)
    return extents


def refuse_bad(extents: list[Extent]) -> None:
    """Raise an error if the table entry of one of the extents is bad.

    Raises:
        CorruptImageError: A table entry is bad; the message describes the first such entry.
    """
    for extent in extents:
        if extent.kind is Kind.BAD:
            raise CorruptImageError(extent.reason)
