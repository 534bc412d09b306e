"""Growing a disk: the added range reads as zeros, whatever a base or the file holds there.

Without precautions, three things could be read in the added range instead of zeros:

- Bytes past the end of the disk in its last cluster.  These bytes are overwritten with zeros.
- Clusters to which table entries past the end of the disk refer.  By default growing is refused
  then.  With ``force`` the clusters are deallocated, and only a bad entry is refused.
- Data of a base that is longer than the disk.  Zero clusters hide it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.maintenance.disksize import first_in_use
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.disk.datapath.discard import Discard
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.maintenance.disksize import DiskSize
    from qedfuse.disk.writeback.metadata import MetadataWriteback


class DiskGrowth:
    """Grows a disk."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        disk_size: DiskSize,
        write_path: WritePath,
        discard: Discard,
        writeback: MetadataWriteback,
    ) -> None:
        """Prepare to grow ``layer``, the top of ``chain``; ``disk_size`` changes its size."""
        self._chain = chain
        self._layer = layer
        self._disk_size = disk_size
        self._write_path = write_path
        self._discard = discard
        self._writeback = writeback

    async def grow(self, size: int, *, force: bool = False) -> None:
        """Grow the disk to ``size`` bytes, durably; do nothing if it has that many bytes or more.

        Args:
            size: The new size, which the caller must have passed to `DiskSize.check`.
            force: Whether to deallocate the clusters to which table entries for the added range
                refer, instead of raising an error.

        Raises:
            CorruptImageError: A table entry for the added range is bad, or refers to data and
                ``force`` is False; the disk has its old size.
            HostError: A system call failed; the disk has its old size.
            ReadOnlyError: The disk has become read-only during the call; it has its old size.
        """
        async with self._disk_size.lock:
            if size <= self._layer.size:
                return
            await self._zero_past_end(size, force=force)
            # Make the zeros, and the entries that hide the base, durable before the size is
            # written.  Otherwise, after a crash, the added range could show the old bytes of the
            # file or the data of the base.
            await self._writeback.barrier()
            await self._disk_size.change(size)

    async def _zero_past_end(self, size: int, *, force: bool) -> None:
        """Make the range from the disk's end to ``size`` read as zeros once the disk has grown."""
        geometry = self._layer.geometry
        old, cluster_end = self._layer.size, geometry.ceil(self._layer.size)
        base_end = max((base.size for base in self._chain.layers[1:]), default=0)
        if cluster_end < size:
            extent = await first_in_use(self._layer, cluster_end, size)
            if extent is not None and force and extent.kind is Kind.DATA:
                await self._discard.drop(cluster_end, geometry.ceil(size))
            elif extent is not None:
                is_bad = extent.kind is Kind.BAD
                cure = (
                    "the image must be repaired first"
                    if is_bad
                    else "qedimg resize --force drops the data"
                )
                msg = (
                    f"{self._layer.file.name}: resize: found a table entry in use for guest "
                    f"offset {extent.start}, past the end of the disk at {old}, expected "
                    f"none: {cure}"
                )
                raise CorruptImageError(msg)
        if old < cluster_end:
            await self._write_path.zero_range(old, min(cluster_end, size))
        if cluster_end < min(size, base_end):
            await self._write_path.write_zero_clusters(
                cluster_end, geometry.ceil(min(size, base_end))
            )
