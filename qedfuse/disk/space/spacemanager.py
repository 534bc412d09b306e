"""Handing out clusters, after waiting for free clusters or for the file's growth if needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from qedfuse.errors import NoSpaceError
from qedfuse.ondisk.constants import MAX_OFFSET

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Allocator, Run
    from qedfuse.disk.space.filelength import FileLength
    from qedfuse.hostio.hostfile import HostFile


class FreeClusterSource(Protocol):
    """The interface of an object that makes further clusters free: see `DirectReclaim`."""

    def should_reclaim(self) -> bool:
        """Return whether `reclaim_before_growth` is worth waiting for."""

    async def reclaim_before_growth(self) -> None:
        """Make clusters free, if there are enough to be worth it, so the file need not grow."""

    async def wait_for_free_clusters(self) -> bool:
        """Wait until clusters may have become free; return False if there are none to wait for."""


class SpaceManager:
    """Hands out the clusters of one image file.

    Methods that wait raise NoSpaceError if the file cannot grow any more, HostError if the host
    refuses, and ReadOnlyError if the disk has become read-only.
    """

    def __init__(
        self, file: HostFile, allocator: Allocator, length: FileLength, source: FreeClusterSource
    ) -> None:
        """Hand out clusters of ``allocator``; ``source`` frees clusters before the file grows."""
        self._file = file
        self._allocator = allocator
        self._length = length
        self._source = source
        self._free = allocator.free
        # Looked up only once, because `try_allocate` is on the fast path.
        self._should_reclaim = source.should_reclaim
        self._choose = allocator.choose
        self._make_run = allocator.make_run
        self._hand_out = allocator.hand_out
        self._try_grow = length.try_grow
        self.release = allocator.release
        """Free a run that was handed out, and to which no entry has referred since."""

    def try_allocate(self, clusters: int) -> Run | None:
        """Hand out ``clusters`` neighbouring clusters; return None if that would block or fail.

        Returns None also if clusters should be reclaimed before the file grows, or if the chosen
        run is too short (a longer one may be free).  After None, nothing has been handed out.
        """
        if not self._free.count and self._should_reclaim():
            return None
        found = self._choose(clusters)
        if found is None:
            return None
        first, count = found
        run = self._make_run(first, count)
        if count < clusters or not self._try_grow(run.end):
            self._allocator.put_back(first, count)
            return None
        self._hand_out(run)
        return run

    async def allocate(self, clusters: int) -> Run:
        """Hand out a run of 1 to ``clusters`` clusters; the caller must call again for the rest.

        The caller must have left its epoch (`Epochs`), because this method may wait until all
        requests of the epoch have ended.
        """
        if not self._free.count:
            await self._source.reclaim_before_growth()
        found = self._choose(clusters)
        while found is None and await self._source.wait_for_free_clusters():
            found = self._choose(clusters)
        return await self._hand_out_and_grow(*(found or self._allocator.choose_any()))

    async def allocate_table(self) -> Run:
        """Hand out the clusters of a new table.

        If possible they lie below `Geometry.bound`, otherwise at the end of the file.

        The caller must have left its epoch (`Epochs`): see `allocate`.
        """
        found = self._allocator.choose_table()
        while found is None and await self._source.wait_for_free_clusters():
            found = self._allocator.choose_table()
        if found is None:
            return await self.allocate_table_at_end()
        return await self._hand_out_and_grow(found, self._free.table_clusters)

    async def allocate_table_at_end(self) -> Run:
        """Hand out the clusters of a table at the end of the file, even past `Geometry.bound`.

        Does not wait for clusters to become free.
        """
        return await self._hand_out_and_grow(
            self._allocator.end >> self._allocator.cluster_bits, self._free.table_clusters
        )

    async def allocate_lowest(self, clusters: int) -> Run | None:
        """Hand out the lowest free run, or its first ``clusters`` clusters; None without one."""
        found = self._free.take(clusters)
        return found and await self._hand_out_and_grow(*found)

    async def allocate_from(self, first: int, clusters: int) -> Run:
        """Hand out the lowest free run at or past ``first``, or its first ``clusters`` clusters.

        If there is none, the run lies at the end of the file, even past `Geometry.bound`.
        """
        end = self._allocator.end >> self._allocator.cluster_bits
        found = self._free.take_from(first, clusters) or (end, clusters)
        return await self._hand_out_and_grow(*found)

    async def _hand_out_and_grow(self, first: int, count: int) -> Run:
        """Hand out clusters that were just chosen, and grow the file if it is too short for them.

        The caller must not have awaited anything since the clusters were chosen.  After an error
        the clusters are free again.
        """
        run = self._make_run(first, count)
        if run.end > MAX_OFFSET:
            msg = f"{self._file.name}: file size: found {run.end}, expected at most {MAX_OFFSET}"
            raise NoSpaceError(msg)
        # No await since the clusters were chosen, so no other task has been given the same
        # clusters.
        self._hand_out(run)
        try:
            # After a failed attempt to grow the file, free clusters can lie past the file's end.
            await self._length.grow(run.end)
        except BaseException:
            self.release(run)
            raise
        return run
