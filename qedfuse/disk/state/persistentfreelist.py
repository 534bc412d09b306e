"""The persistent free list of one opened image, from its opening to its close.

While the image is open for writing the list lives in memory, in the allocator.  In the
file it is invalid from before the first modification on, so that a crash never leaves a
list that is accepted and no longer true; the next open scans then.  A clean close writes
the list again.

    opening          read and validate the list; if valid, the scan is postponed
    first write      clear the bit -> datasync, then anything may change
    tables change    scan: what no table refers to is free, whatever the list says
    close            all tables durable, NEED_CHECK clear ->
                     list and descriptor -> datasync -> set the bit -> datasync

A session that neither allocates a cluster nor frees one needs no scan: its list is as true
as before, so the descriptor is written back unchanged.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np

from qedfuse.disk.space.allocator import MAX_FREE_CLUSTERS
from qedfuse.disk.state.freelistreader import (
    MAX_RUNS,
    add_runs,
    backing_name_covers_descriptor,
    read_list,
)
from qedfuse.disk.state.freelistwriter import refuse_occupied_descriptor, write_list
from qedfuse.errors import CorruptImageError, HostError, QedError
from qedfuse.ondisk.freelist import DESCRIPTOR_OFFSET

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
    """Keeps the list in the file true, or invalid.

    Attributes:
        wanted: Whether a clean close writes a list.
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
        """Look after the list of ``layer``; ``guard`` makes it invalid with ``eraser``."""
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
        self.wanted = self._option == "on" or (self._option == "keep" and not eraser.erased)

    async def open(self) -> None:
        """Read the list of the image; make it invalid if it is bad or not wanted.

        Raises:
            UsageError: A list is requested, and its place in the header is occupied.
            HostError: The host refused.
        """
        header = self._header_store.value
        if self._option == "on":
            await refuse_occupied_descriptor(self._file, header)
        if self._eraser.erased:
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
        """Keep a valid list for the scan, which is postponed until it is needed."""
        self._found = found
        listed = self._allocator.free.empty_like()
        holding_list = listed.empty_like()
        holding_list.add_many(found.holding_clusters)
        await add_runs(listed, found.runs)
        self._scan.postpone(listed, holding_list)

    @property
    def needs_scan(self) -> bool:
        """Whether a list can be written only after the scan has ended."""
        return self.wanted and not self._scan.is_postponed

    async def save(self) -> None:
        """Write the list and set the bit; everything else must be durable and at rest.

        If the host has no space for the list a warning is logged: without it the image is
        as good, and the next open scans.

        Raises:
            HostError: A datasync failed, or the header could not be written.
        """
        if not self.wanted or not self._eraser.erased or not self._at_rest():
            return
        unchanged = self._found if self._scan.is_postponed else None
        runs = None if unchanged else self._free_runs()
        if not unchanged and runs is None:
            return
        await self._guard.prepare_write()
        try:
            await refuse_occupied_descriptor(self._file, self._header_store.value)
            if unchanged:
                # Nothing but the descriptor: only a scan knows which clusters are free.
                await self._file.pwrite(DESCRIPTOR_OFFSET, unchanged.descriptor)
            elif runs is not None:
                await write_list(self._file, self._header_store.value, runs)
        except QedError as error:
            log.warning("%s (while writing the free list, which is left out)", error)
            return
        await self._writeback.barrier()
        await self._header_store.change(lambda header: header.with_free_list(value=True))
        # Safety does not need this one: a power failure that loses the bit costs a scan.
        await self._writeback.barrier()

    def _at_rest(self) -> bool:
        """Return whether the image is clean, and its file has no unused tail.

        A free cluster that is not listed is leaked until the next scan, so a list is
        complete or not written.
        """
        return (
            self._file.size() == self._allocator.end
            and self._header_store.persisted
            and not self._header_store.value.need_check
            and not self._layer.damaged
            and not self._writeback.dirty_tables
        )

    def _free_runs(self) -> Runs | None:
        """Collect the free runs; None if not all are known, or there are none, or too many."""
        allocator = self._allocator
        if (
            not allocator.scan_complete
            or self._reclaim.has_untrusted
            or allocator.free.count >= MAX_FREE_CLUSTERS
        ):
            return None
        found = list(itertools.islice(allocator.free.runs(), MAX_RUNS + 1))
        if len(found) > MAX_RUNS:
            log.info(
                "%s: free list: found more than %d runs: not written", self._file.name, MAX_RUNS
            )
            return None
        return np.array(found, np.uint64) if found else None
