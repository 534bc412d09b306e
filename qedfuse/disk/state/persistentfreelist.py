"""The persistent free list of one opened image, from its opening to its close.

While the image is open for writing the list lives in memory, in the allocator.  On disk
it is invalid from before the first change on, so that a crash never leaves a list that
is believed and no longer true; then the next open scans.  A clean close writes it again.

    opening          read and judge the list; good: the scan waits until it is needed
    first change     clear the bit -> datasync, then anything may change
    tables change    scan: what the tables do not refer to is free, whatever the list says
    close            all tables durable, NEED_CHECK clear ->
                     list and descriptor -> datasync -> set the bit -> datasync

A session that gives no cluster a place and takes none away needs no scan: its list is as
true as it was, so the descriptor is written back as it was.
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np
import trio

from qedfuse.disk.space.allocator import MAX_FREE
from qedfuse.disk.space.freelist import (
    MAX_RUNS,
    erase_descriptor,
    name_in_the_way,
    read_list,
    refuse_taken_place,
    write_list,
)
from qedfuse.disk.space.freemap import BLOCK
from qedfuse.errors import CorruptImageError, HostError, QedError
from qedfuse.ondisk.freelist import DESCRIPTOR_OFFSET

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.options import OpenOptions
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.freelist import FreeList
    from qedfuse.disk.space.freemap import FreeMap
    from qedfuse.disk.space.reclaim import Reclaim
    from qedfuse.disk.space.scan import Scan
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.ondisk.freelist import Runs

log = logging.getLogger(__name__)


class PersistentFreeList:
    """Keeps the list on disk true, or invalid.

    Attributes:
        wanted: Whether a clean close is to write a list.
    """

    def __init__(
        self,
        layer: QedLayer,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        allocator: Allocator,
        reclaim: Reclaim,
        scan: Scan,
        options: OpenOptions,
        prepare_write: Callable[[], Awaitable[None]],
    ) -> None:
        """Look after the list of ``layer``; ``prepare_write`` makes it invalid."""
        self._layer = layer
        self._file = layer.file
        self._header_store = header_store
        self._writeback = writeback
        self._allocator = allocator
        self._reclaim = reclaim
        self._scan = scan
        self._option = options.free_list
        self._prepare_write = prepare_write
        self._listed: FreeList | None = None
        self._on_disk = header_store.value.free_list
        self.wanted = self._option == "on" or (self._option == "keep" and self._on_disk)

    async def open(self) -> None:
        """Take over the list of the image; one that is bad or not wanted is dropped.

        Raises:
            UsageError: A list is asked for, and its place in the header is taken.
            HostError: The host refused.
        """
        header = self._header_store.value
        if self._option == "on":
            await refuse_taken_place(self._file, header)
        if not self._on_disk:
            return
        self.wanted = self.wanted and not name_in_the_way(header)
        try:
            listed = await read_list(self._file, header, self._layer.l2_tables)
        except (CorruptImageError, HostError) as error:
            log.warning("%s: the list is dropped, and the tables are scanned instead", error)
        else:
            if self._option != "off":
                await self._postpone_scan(listed)
                return
        await self._prepare_write()

    async def _postpone_scan(self, listed: FreeList) -> None:
        """Keep a good list for the scan, which waits until it is needed."""
        self._listed = listed
        clusters, holding_list = self._allocator.make_map(), self._allocator.make_map()
        holding_list.add_many(listed.places)
        await _fill(clusters, listed.runs)
        self._scan.postpone(clusters, holding_list)

    async def forget(self) -> None:
        """Wipe what is left of the list, now that the bit is durably clear.

        The one datasync that made it so is enough.  If a crash loses what is written
        here, an old descriptor stays that nobody reads: see `erase_descriptor`.
        """
        if self._on_disk:
            await erase_descriptor(self._file, self._header_store.value)
            self._writeback.note_write()
            self._on_disk = False

    # At the end

    @property
    def needs_scan(self) -> bool:
        """Whether a list can only be written once the scan has ended."""
        return self.wanted and not self._scan.is_postponed

    async def save(self) -> None:
        """Write the list and set the bit; everything else must be durable and at rest.

        A host that has no room for the list costs a warning: without it the image is as
        good, and the next open scans.

        Raises:
            HostError: A datasync failed, or the header could not be written.
        """
        if not self.wanted or self._on_disk or not self._at_rest():
            return
        again = self._listed if self._scan.is_postponed else None
        runs = None if again else self._runs()
        if not again and runs is None:
            return
        await self._prepare_write()
        try:
            await refuse_taken_place(self._file, self._header_store.value)
            if again:
                # Nothing but the descriptor: only a scan knows which clusters are free.
                await self._file.pwrite(DESCRIPTOR_OFFSET, again.descriptor)
            elif runs is not None:
                await write_list(self._file, self._header_store.value, runs)
        except QedError as error:
            log.warning("%s (while writing the free list, which is left out)", error)
            return
        await self._writeback.barrier()
        await self._header_store.change(lambda header: header.with_free_list(value=True))
        # Not for safety: a power failure that lost the bit would cost the next open a scan.
        await self._writeback.barrier()

    def _at_rest(self) -> bool:
        """Tell whether the image is clean, and cut to length.

        What is not listed is leaked until the next scan, so a list is complete or not
        written at all.
        """
        return (
            self._file.size() == self._allocator.end
            and self._header_store.persisted
            and not self._header_store.value.need_check
            and not self._layer.damaged
            and not self._writeback.dirty_tables
        )

    def _runs(self) -> Runs | None:
        """Collect the free runs; None if not all are known, or there are none, or too many."""
        allocator = self._allocator
        if (
            not allocator.scan_complete
            or self._reclaim.untrusted_end
            or allocator.free.count >= MAX_FREE
        ):
            return None
        found = list(itertools.islice(allocator.free.runs(), MAX_RUNS + 1))
        if len(found) > MAX_RUNS:
            log.info(
                "%s: free list: found more than %d runs: not written", self._file.name, MAX_RUNS
            )
            return None
        return np.array(found, np.uint64) if found else None


async def _fill(clusters: FreeMap, runs: Runs) -> None:
    """Add runs of clusters to a map."""
    first = runs[:, 0].astype(np.int64) + clusters.shift
    last = first + runs[:, 1].astype(np.int64)
    # A run at a time takes three microseconds; a block at a time less, if it has several.
    within = first // BLOCK == (last - 1) // BLOCK
    for start, count in runs[~within].tolist():
        clusters.add(start, count)
    first, last = first[within], last[within]
    edges = np.flatnonzero(np.diff(first // BLOCK, prepend=-1)).tolist()
    for begin, end in itertools.pairwise([*edges, len(first)]):
        block = int(first[begin]) // BLOCK
        clusters.add_block(block, _bits(first[begin:end] % BLOCK, last[begin:end] - block * BLOCK))
        await trio.lowlevel.checkpoint()


def _bits(first: NDArray[np.int64], last: NDArray[np.int64]) -> int:
    """Give an integer whose bits are set from each ``first`` up to its ``last``; all apart."""
    change = np.zeros(BLOCK + 1, np.int8)
    change[first] = 1
    change[last] = -1
    ones = np.packbits(np.cumsum(change[:BLOCK], dtype=np.int8).view(np.uint8), bitorder="little")
    return int.from_bytes(ones.tobytes(), "little")
