"""The persistent free list of one opened image, from its opening to its close.

While the image is open for writing the list lives in memory, in the allocator.  On disk
it is invalid from before the first change on, so that a crash never leaves a list that
is believed and no longer true; then the next open scans.  A clean close writes it again.

    opening          read and judge the list; good: its runs are free, and no scan is needed
    first change     clear the bit -> datasync, then anything may change
    close            all tables durable, NEED_CHECK clear ->
                     list and descriptor -> datasync -> set the bit -> datasync
"""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

import numpy as np
import trio

from qedfuse.disk.allocator import MAX_FREE
from qedfuse.disk.freelist import (
    MAX_RUNS,
    erase_descriptor,
    name_in_the_way,
    read_list,
    refuse_taken_place,
    write_list,
)
from qedfuse.disk.freemap import BLOCK, FreeMap
from qedfuse.errors import CorruptImageError, HostError, QedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from qedfuse.disk.allocator import Allocator
    from qedfuse.disk.commit import Commit
    from qedfuse.disk.freelist import FreeList
    from qedfuse.disk.layer import QedLayer
    from qedfuse.disk.liveheader import LiveHeader
    from qedfuse.disk.options import OpenOptions
    from qedfuse.disk.reclaim import Reclaim
    from qedfuse.disk.scan import Scan
    from qedfuse.ondisk.freelist import Runs

log = logging.getLogger(__name__)


class SavedList:
    """Keeps the list on disk true, or invalid.

    Attributes:
        wanted: Whether a clean close is to write a list.
    """

    def __init__(
        self,
        layer: QedLayer,
        live: LiveHeader,
        commit: Commit,
        allocator: Allocator,
        reclaim: Reclaim,
        scan: Scan,
        options: OpenOptions,
        before_change: Callable[[], Awaitable[None]],
    ) -> None:
        """Look after the list of ``layer``; ``before_change`` makes it invalid."""
        self._layer = layer
        self._file = layer.file
        self._live = live
        self._commit = commit
        self._allocator = allocator
        self._reclaim = reclaim
        self._scan = scan
        self._option = options.free_list
        self._before_change = before_change
        self._bits = allocator.cluster_bits
        self._listed: FreeList | None = None
        self._on_disk = live.value.free_list
        self._contradicted = trio.Event()
        self.wanted = self._option == "on" or (self._option == "keep" and self._on_disk)

    async def open(self) -> None:
        """Take over the list of the image; one that is bad or not wanted is dropped.

        Raises:
            UsageError: A list is asked for, and its place in the header is taken.
            HostError: The host refused.
        """
        header = self._live.value
        if self._option == "on":
            await refuse_taken_place(self._file, header)
        if not self._on_disk:
            return
        self.wanted = self.wanted and not name_in_the_way(header)
        try:
            await self._adopt(await read_list(self._file, header, self._layer.l2_tables))
        except (CorruptImageError, HostError) as error:
            log.warning("%s: the list is dropped, and the tables are scanned instead", error)
        else:
            if self._option != "off":
                return
        await self._before_change()

    async def _adopt(self, listed: FreeList) -> None:
        """Tell the allocator what is free."""
        free = self._allocator.free
        first = listed.runs[:, 0].astype(np.int64) + free.shift
        last = first + listed.runs[:, 1].astype(np.int64)
        # A run at a time takes three microseconds; a block at a time less, if it has several.
        within = first // BLOCK == (last - 1) // BLOCK
        self._allocator.adopt(listed.runs[~within].tolist(), punched=True)
        first, last = first[within], last[within]
        edges = np.flatnonzero(np.diff(first // BLOCK, prepend=-1)).tolist()
        for begin, end in itertools.pairwise([*edges, len(first)]):
            block = int(first[begin]) // BLOCK
            free.add_block(block, _bits(first[begin:end] % BLOCK, last[begin:end] - block * BLOCK))
            await trio.lowlevel.checkpoint()
        self._listed = listed
        self._layer.witness = self.notice
        self._allocator.known = True
        self._reclaim.settle()

    async def forget(self) -> None:
        """Wipe what is left of the list, now that the bit is durably clear.

        The one datasync that made it so is enough.  If a crash loses what is written
        here, an old descriptor stays that nobody reads: see `erase_descriptor`.
        """
        if self._on_disk:
            await erase_descriptor(self._file, self._live.value)
            self._commit.note_write()
            self._on_disk = False
            if self._listed is not None:
                # The clusters that held the list take up space on the host.
                for place in self._listed.places.tolist():
                    self._allocator.unpunched.add(place, 1)

    # While the disk is in use

    def contradicts(self, entries: NDArray[np.uint64]) -> bool:
        """Tell whether L2 entries from the file refer to a listed cluster not yet handed out."""
        if self._listed is None:
            return False
        clusters = entries >> np.uint64(self._bits)
        again = clusters[self._listed.holds(clusters)].tolist()
        return any(not self._scan.witnessed.holds(cluster, 1) for cluster in again)

    def notice(self, entries: NDArray[np.uint64]) -> None:
        """Look at L2 entries that were read from the file, and withdraw a list that is wrong."""
        if self._listed is None or not self.contradicts(entries):
            return
        withdrawn = FreeMap()
        for first, count in self._listed.runs.tolist():
            withdrawn.add(first, count)
        for first, count in self._scan.witnessed.runs():
            withdrawn.remove(first, count)
        for first, count in withdrawn.runs():
            self._allocator.free.remove(first, count)
            self._allocator.unpunched.remove(first, count)
            self._allocator.doubtful.remove(first, count)
        if self._scan.witnessed.count:
            # What was handed out already may have had an owner: only a check can tell.
            self._layer.damaged = True
        log.error(
            "%s: free list: found a table entry for a cluster that is listed as free, expected "
            "none: the list is dropped, and the tables are scanned instead",
            self._file.name,
        )
        self._listed = None
        self._allocator.known = False
        self._reclaim.ready = trio.Event()
        self._contradicted.set()

    async def watch(self) -> None:
        """Wait for a contradiction; then drop the list and scan: a background task."""
        await self._contradicted.wait()
        try:
            await self._before_change()
        except QedError as error:
            log.error("%s (while dropping the free list)", error)  # noqa: TRY400
        await self._scan.run()

    # At the end

    async def save(self) -> None:
        """Write the list and set the bit; everything else must be durable and at rest.

        A host that has no room for the list costs a warning: without it the image is as
        good, and the next open scans.

        Raises:
            HostError: A datasync failed, or the header could not be written.
        """
        if self._contradicted.is_set() and self._on_disk:
            await self._before_change()
        if not self.wanted or self._on_disk or not self._at_rest():
            return
        runs = self._runs()
        if runs is None:
            return
        await self._before_change()
        try:
            await refuse_taken_place(self._file, self._live.value)
            await write_list(self._file, self._live.value, runs)
        except QedError as error:
            log.warning("%s (while writing the free list, which is left out)", error)
            return
        await self._commit.barrier()
        await self._live.change(lambda header: header.with_free_list(value=True))
        # Not for safety: a power failure that lost the bit would cost the next open a scan.
        await self._commit.barrier()

    def _at_rest(self) -> bool:
        """Tell whether all free clusters are known, and the image is clean and cut to length.

        What is not listed is leaked until the next scan, so a list is complete or not
        written at all.
        """
        return (
            self._allocator.known
            and self._file.size() == self._allocator.end
            and self._reclaim.untrusted_end == 0
            and self._live.settled
            and not self._live.value.need_check
            and not self._layer.damaged
            and self._allocator.free.count < MAX_FREE
            and not self._commit.dirty_tables
        )

    def _runs(self) -> Runs | None:
        """Collect the free runs; None if there are none, or too many."""
        found = list(itertools.islice(self._allocator.free.runs(), MAX_RUNS + 1))
        if len(found) > MAX_RUNS:
            log.info(
                "%s: free list: found more than %d runs: not written", self._file.name, MAX_RUNS
            )
            return None
        return np.array(found, np.uint64) if found else None


def _bits(first: NDArray[np.int64], last: NDArray[np.int64]) -> int:
    """Give an integer whose bits are set from each ``first`` up to its ``last``; all apart."""
    change = np.zeros(BLOCK + 1, np.int8)
    change[first] = 1
    change[last] = -1
    ones = np.packbits(np.cumsum(change[:BLOCK], dtype=np.int8).view(np.uint8), bitorder="little")
    return int.from_bytes(ones.tobytes(), "little")
