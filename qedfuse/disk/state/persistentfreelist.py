"""The persistent free list of one opened image, from its opening to its close.

While an open image is modified, its free clusters are known only in memory.  The list in the file
is made invalid before the first modification, so that a crash never leaves a valid list with
clusters that are in use.  A clean close writes a list again, if the options say so.  Without a
valid list, the next open scans the tables.

A feature bit in the header says that the image has a valid list.  A descriptor in the header's
cluster says where the list is.

    opening             read and validate the list; if it is valid and wanted, postpone the scan
    first write         clear the bit -> datasync -> erase the descriptor,
                        then anything may change
    first table change  scan; from then on only the result of the scan counts
    close               all tables durable, NEED_CHECK clear ->
                        list and descriptor -> datasync -> set the bit -> datasync

If no table was changed, the list still contains exactly the free clusters.  Then the close only
writes the old descriptor back and sets the bit again.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np

from qedfuse.disk.space.allocator import MAX_FREE_CLUSTERS
from qedfuse.disk.state.freelistreader import MAX_RUNS, read_list
from qedfuse.disk.state.freelistruns import add_runs
from qedfuse.disk.state.freelistwriter import refuse_occupied_descriptor, write_list
from qedfuse.errors import CorruptImageError, HostError, QedError
from qedfuse.ondisk.freelist import DESCRIPTOR_OFFSET, backing_name_covers_descriptor

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.options import OpenOptions
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.space.scan import Scan
    from qedfuse.disk.state.freelistreader import FreeList
    from qedfuse.disk.state.freelistwriter import DescriptorEraser
    from qedfuse.disk.writeback.firstwrite import FirstWriteGuard
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.ondisk.freelist import Runs

log = logging.getLogger(__name__)


class PersistentFreeList:
    """Ensures that at any moment the list in the file is invalid or right.

    Attributes:
        wanted: Whether a clean close writes a list if it can; constant after `open`.
        error: Why the close could not write the list; None if it could, or if no list was possible.
    """

    def __init__(
        self,
        layer: QedLayer,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        guard: FirstWriteGuard,
        eraser: DescriptorEraser,
        allocator: Allocator,
        reclaim: Reclaim,
        scan: Scan,
        options: OpenOptions,
    ) -> None:
        """Manage the list of ``layer``; ``guard`` uses ``eraser`` before the first change."""
        self._layer = layer
        self._file = layer.file
        self._header_store = header_store
        self._writeback = writeback
        self._guard = guard
        self._eraser = eraser
        self._allocator = allocator
        self._reclaim = reclaim
        self._scan = scan
        self._option = options.free_list
        self._found: FreeList | None = None
        self.error: QedError | None = None
        self.wanted = self._option == "on" or (self._option == "keep" and eraser.has_descriptor)

    async def open(self) -> None:
        """Read the image's list, if any; make it invalid if it is bad or the option is ``off``.

        If it stays valid, the scan is postponed.  If the list cannot be read, a warning is logged.

        Raises:
            UsageError: A list is requested, but the bytes for its descriptor are in use.
            HostError: A system call failed.
        """
        header = self._header_store.value
        if self._option == "on":
            await refuse_occupied_descriptor(self._file, header)
        if not self._eraser.has_descriptor:
            return
        self.wanted = self.wanted and not backing_name_covers_descriptor(header)
        try:
            found = await read_list(self._file, header, self._layer.l2_tables)
        except (CorruptImageError, HostError) as error:
            log.warning("%s: the list is dropped, and the tables are scanned instead", error)
        else:
            if self._option != "off":
                await self._postpone_scan(found)
                return
        await self._guard.prepare_write()

    async def _postpone_scan(self, found: FreeList) -> None:
        """Postpone the scan until it is needed; pass the listed clusters to it."""
        self._found = found
        listed = self._allocator.free.empty_like()
        list_clusters = listed.empty_like()
        list_clusters.add_many(found.list_cluster_indices)
        await add_runs(listed, found.runs)
        self._scan.postpone(listed, list_clusters)

    @property
    def needs_scan(self) -> bool:
        """Whether a list is wanted and can be written only after the scan has ended."""
        return self.wanted and not self._scan.is_postponed

    async def save(self) -> None:
        """Write the list and set the bit in the header, if possible.

        Everything else must be durable, and no other task may use the image.  The image is sound
        without a list.  A warning is logged only if writing the list fails.

        Raises:
            HostError: A datasync failed, or the header could not be written.
        """
        if not self.wanted or self._eraser.has_descriptor or not self._at_rest():
            return
        unchanged_list = self._found if self._scan.is_postponed else None
        runs = None if unchanged_list else self._free_runs()
        if not unchanged_list and runs is None:
            return
        await self._guard.prepare_write()
        try:
            await refuse_occupied_descriptor(self._file, self._header_store.value)
            if unchanged_list:
                # Only the descriptor was erased, so the list in the file is still right.  Without a
                # scan the allocator does not know the free clusters, so no new list is possible.
                await self._file.pwrite(DESCRIPTOR_OFFSET, unchanged_list.descriptor)
            elif runs is not None:
                await write_list(self._file, self._header_store.value, runs)
        except QedError as error:
            log.warning(
                "%s (while writing the free list: the image is closed without a list)", error
            )
            self.error = error
            return
        await self._writeback.barrier()
        await self._header_store.change(lambda header: header.with_free_list(value=True))
        # Without this barrier a power failure could lose the bit, and the next open would scan.
        await self._writeback.barrier()

    def _at_rest(self) -> bool:
        """Return whether the image is in a state for which a list can be written.

        NEED_CHECK must be clear, and the tables undamaged and durable.  The file must end at
        `Allocator.end`: later clusters would be missing in the list, and so would be leaked.
        """
        return (
            self._file.size() == self._allocator.end
            and self._header_store.persisted
            and not self._header_store.value.need_check
            and not self._layer.damaged
            and not self._writeback.dirty_tables
        )

    def _free_runs(self) -> Runs | None:
        """Return all runs of free clusters; None if a list is impossible or would be empty."""
        allocator = self._allocator
        if (
            not allocator.scan_complete
            or self._reclaim.has_untrusted
            or allocator.free.count >= MAX_FREE_CLUSTERS
        ):
            return None
        free_runs = list(itertools.islice(allocator.free.runs(), MAX_RUNS + 1))
        if len(free_runs) > MAX_RUNS:
            log.info(
                "%s: free list: not written, because it would have more than %d runs",
                self._file.name,
                MAX_RUNS,
            )
            return None
        return np.array(free_runs, np.uint64) if free_runs else None
