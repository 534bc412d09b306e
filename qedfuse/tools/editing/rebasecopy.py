"""The copy that a rebase makes: the content of the old bases that differs from the new bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.lookup.chain import Chain
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.lookup.foreignopening import content_identity
from qedfuse.disk.lookup.seek import next_data
from qedfuse.ondisk.constants import SECTOR
from qedfuse.tools.editing.ownextents import batch_starts, own_extents

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.util.backgroundtasks import Progress


_COMPARE_CHUNK_BYTES: Final = 1 << 20
"""Maximum length in bytes of a range that is read from both chains and compared."""


class RebaseCopy:
    """Copies content of an image's old bases into the image.

    A cluster is copied if the image does not store it and the new bases have other content there.

    Attributes:
        copied_bytes: Bytes of the disk written to the image as data so far.
        zero_bytes: Bytes of the disk that became zero clusters so far.
    """

    def __init__(self, disk: Disk, new: Chain) -> None:
        """Prepare a copy.

        Args:
            disk: The image, open with its old bases.
            new: The future chain: the same image over its new bases.
        """
        self._disk = disk
        self._old = disk.chain
        self._new = new
        self._bases = [Chain(chain.layers[1:]) for chain in (self._old, new) if chain.has_base]
        self._data_at = [-1] * len(self._bases)
        """For each chain in `_bases` the guest offset of the data that was found last."""
        self._cluster_size = disk.header.geometry.cluster_size
        self._step_bytes = max(_COMPARE_CHUNK_BYTES, self._cluster_size)
        self.copied_bytes = 0
        self.zero_bytes = 0

    async def run(self, progress: Progress | None) -> None:
        """Copy the clusters that differ, in all ranges that the image does not store itself.

        Args:
            progress: Called with the guest offset that the copy has reached, and the disk's size.

        Raises:
            CorruptImageError: A table entry of the image or of a base is bad.
            HostError: A system call failed.
        """
        for start in batch_starts(self._disk.size, self._cluster_size):
            for extent in await own_extents(self._disk, start):
                if progress is not None:
                    progress(extent.start, self._disk.size)
                if extent.kind is Kind.UNALLOCATED:
                    await self._copy_unallocated(extent, progress)

    async def _copy_unallocated(self, extent: Extent, progress: Progress | None) -> None:
        """Copy the clusters of an unallocated range that differ between the old and new bases."""
        at = await self._next_data_cluster(extent.start)
        while at < extent.end:
            stop = min(extent.end, at - at % self._step_bytes + self._step_bytes)
            if not await self._is_shared(at, stop):
                await self._copy_differences(at, stop)
            if progress is not None:
                progress(stop, self._disk.size)
            at = await self._next_data_cluster(stop)

    async def _next_data_cluster(self, start: int) -> int:
        """Return where the first cluster with data in the old or the new bases begins.

        The search begins at the guest offset ``start``: the beginning of a cluster, or the end of
        the disk.  It must not decrease from one call to the next.
        Bad table entries and a partial last cluster count as data.  The result may lie past the end
        of the disk.
        """
        for index, chain in enumerate(self._bases):
            # Data that was found at or past ``start`` is still the first such data, because its
            # search began at or before ``start``.
            if self._data_at[index] < start:
                found = await next_data(chain, start)
                self._data_at[index] = self._disk.size if found is None else found
        first = min(self._data_at, default=self._disk.size)
        return max(start, self._disk.header.geometry.floor(first))

    async def _is_shared(self, start: int, end: int) -> bool:
        """Return whether the bases of both chains store a range as the same bytes of the same file.

        If not, the contents may still be equal.
        """
        old = await self._old.extents(start, end - start, depth=1)
        new = await self._new.extents(start, end - start, depth=1)
        return len(old) == len(new) and all(
            one.kind is other.kind is Kind.DATA
            and (one.start, one.length, one.file_offset)
            == (other.start, other.length, other.file_offset)
            and content_identity(self._old.layers[one.depth].file)
            == content_identity(self._new.layers[other.depth].file)
            for one, other in zip(old, new, strict=True)
        )

    async def _copy_differences(self, start: int, end: int) -> None:
        """Compare unallocated clusters, and copy the clusters that differ."""
        size = self._cluster_size
        if size > _COMPARE_CHUNK_BYTES:
            await self._copy_large_cluster(start, end)
            return
        old = await self._old.read(start, end - start, depth=1)
        new = await self._new.read(start, end - start, depth=1)
        if old == new:
            return
        data, zeros = memoryview(old), bytes(size)
        # Adjacent clusters of one kind form a run, which is written by one call.  The kind is
        # `run_is_zero`: None for clusters that do not differ, otherwise whether the old bases have
        # zeros.
        run_start, run_is_zero = start, None
        # One more iteration, past the last cluster, ends the last run.
        for at in range(start, end + size, size):
            cluster = old[at - start : at - start + size]
            differs = at < end and cluster != new[at - start : at - start + size]
            is_zero = cluster == zeros[: len(cluster)] if differs else None
            if is_zero is not run_is_zero:
                if run_is_zero is not None:
                    content = data[run_start - start : at - start]
                    await self._write(run_start, content, zero=run_is_zero)
                run_start, run_is_zero = at, is_zero

    async def _write(self, start: int, content: memoryview, *, zero: bool) -> None:
        """Write clusters as data or as zero clusters; only the disk's last one may be partial."""
        if zero:
            await self._disk.write_zero_clusters(start, len(content))
            self.zero_bytes += len(content)
        else:
            await self._disk.write(start, content)
            self.copied_bytes += len(content)

    async def _copy_large_cluster(self, start: int, end: int) -> None:
        """Compare one large cluster chunk by chunk, and copy the cluster if it differs."""
        differs, is_zero = False, True
        for at in range(start, end, _COMPARE_CHUNK_BYTES):
            length = min(_COMPARE_CHUNK_BYTES, end - at)
            old = await self._old.read(at, length, depth=1)
            new = await self._new.read(at, length, depth=1)
            differs = differs or old != new
            is_zero = is_zero and old == bytes(length)
        if differs and is_zero:
            await self._disk.write_zero_clusters(start, end - start)
            self.zero_bytes += end - start
        elif differs:
            # Writing one sector allocates the cluster, and the disk fills the rest of the cluster
            # from the old base (copy-on-write).
            await self._disk.write(start, await self._old.read(start, SECTOR, depth=1))
            self.copied_bytes += end - start
        await trio.lowlevel.checkpoint()
