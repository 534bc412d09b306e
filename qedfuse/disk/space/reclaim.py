"""Giving space back: to the allocator what the quarantine lets go, to the host the rest.

Runs after each commit round.  Clusters at the end of the file are cut off, those in the
middle are punched out of the host's file, so that they take up no space while nobody
needs them.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.space.freemap import BLOCK
from qedfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.freemap import FreeMap
    from qedfuse.disk.space.quarantine import Quarantine
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import HostFile

log = logging.getLogger(__name__)

PUNCHES: Final = 256
"""Runs that are punched after one commit round; a flush waits for them."""

_AT_ONCE: Final = 64
"""Of them so many go to a worker thread together."""

_SCATTERED: Final = 64
"""Runs from which on clusters are not put into quarantine one run after the other."""

_WORTH_SHARE: Final = 16
_WORTH_BYTES: Final = (1 << 20, 1 << 26)
"""How much in quarantine is worth a flush before the file grows: this part of the file, but
at least and at most so many bytes."""


class Reclaim:
    """Decides when clusters that lost their reference are free.

    Attributes:
        punching: Whether free clusters are punched out of the host's file.
        on_retire: Told which clusters come into quarantine, while the scan is under way.
        prepare_write: Awaited before the file is changed.
        ready: Set when the free clusters of the file are known, or never will be.
        untrusted_end: Clusters below this file offset are not used again when they lose
            a reference, because another table entry may refer to them as well.
    """

    def __init__(
        self,
        file: HostFile,
        allocator: Allocator,
        quarantine: Quarantine,
        writeback: MetadataWriteback,
    ) -> None:
        """Move clusters from the quarantine to the allocator."""
        self._file = file
        self._allocator = allocator
        self._quarantine = quarantine
        self._writeback = writeback
        self._lock = trio.Lock()
        self._complained = False
        self._bits = allocator.cluster_bits
        self.prepare_write: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.punching = True
        self._being_punched = 0
        self._freed = 0
        self.on_retire: Callable[[int, int, int], None] = lambda _first, _count, _slice: None
        self.ready = trio.Event()
        self.untrusted_end = 0
        allocator.wait_for_free_clusters = self.wait_for_free_clusters
        allocator.reclaim_before_growth = self.reclaim_before_growth
        allocator.should_reclaim = self.should_reclaim

    def retire(self, offset: int, length: int, dropped_by: int) -> None:
        """Put clusters into quarantine, in the same moment in which a table drops them.

        ``dropped_by`` is the file offset of the slice that does.
        """
        first, count = offset >> self._bits, length >> self._bits
        self._quarantine.retire(first, count)
        self._allocator.record_change(first, count)
        self.on_retire(first, count, dropped_by)

    def retire_all(self, offsets: NDArray[np.uint64], dropped_by: int) -> None:
        """Do as `retire` does with clusters at file offsets, in the order of their entries."""
        if not len(offsets):
            return
        starts = np.flatnonzero(offsets[1:] - offsets[:-1] != 1 << self._bits) + 1
        if len(starts) >= _SCATTERED and not self._allocator.watched:
            self._quarantine.retire_many(offsets >> np.uint64(self._bits))
            return
        for first, last in pairwise([0, *starts.tolist(), len(offsets)]):
            self.retire(int(offsets[first]), (last - first) << self._bits, dropped_by)

    @property
    def pending(self) -> bool:
        """Whether anything waits for a further round."""
        allocator = self._allocator
        if not allocator.scan_complete:
            return False
        unpunched = self._can_punch and allocator.unpunched.count + allocator.maybe_holes.count > 0
        return self._quarantine.count > 0 or allocator.tail_is_free or unpunched

    @property
    def waiting(self) -> int:
        """How many clusters are not given back yet, as far as known."""
        allocator = self._allocator
        return self._quarantine.count + (allocator.unpunched.count if self._can_punch else 0)

    @property
    def _can_punch(self) -> bool:
        return self.punching and self._file.can_punch

    def seal(self) -> None:
        """Note that a commit round takes the tables as they are now."""
        self._quarantine.seal()

    def durable(self) -> None:
        """Note that the round has ended well."""
        self._quarantine.durable()

    async def run(self, punches: int | None = PUNCHES) -> None:
        """Free what may be freed now; punch up to ``punches`` runs, or all if it is None.

        What the host refuses costs space and nothing else, so it is logged and left.
        """
        # Before the scan has ended, a cluster that lost one reference may have another.
        if not self._allocator.scan_complete:
            return
        async with self._lock:
            while (due := self._quarantine.take_due()) is not None:
                bits = due[1] & self._trusted(due[0])
                self._allocator.give_back_block(due[0], bits)
                self._freed += bits.bit_count()
                await trio.lowlevel.checkpoint()
            try:
                self._allocator.lower_end()
                if self._allocator.tail_is_free:
                    await self.prepare_write()
                    if await self._allocator.truncate_tail():
                        self._writeback.note_write()
                await self._punch(punches)
            except HostError as error:
                if not self._complained:
                    self._complained = True
                    log.warning("%s (while giving space back to the host)", error)

    def _trusted(self, block: int) -> int:
        """Give the bits of a block whose clusters may be used again."""
        untrusted = (self.untrusted_end >> self._bits) + self._allocator.free.shift - block * BLOCK
        return -1 << max(0, untrusted)

    async def _punch(self, punches: int | None) -> None:
        """Punch free clusters out of the host's file, the lowest first."""
        left = punches
        while self._can_punch and left != 0:
            runs = _AT_ONCE if left is None else min(left, _AT_ONCE)
            clusters = self._allocator.unpunched
            if clusters.count:
                done = await self._punch_some(clusters, runs)
            else:
                done = await self._punch_some(self._allocator.maybe_holes, runs)
            if not done:
                break
            left = None if left is None else left - done

    async def _punch_some(self, clusters: FreeMap, most: int) -> int:
        """Punch up to so many runs of a map; return how many were taken from it."""
        allocator, bits = self._allocator, self._bits
        taken = [run for run in (clusters.take(BLOCK) for _ in range(most)) if run is not None]
        # Nobody may be given these while the host is about to wipe them.
        for first, count in taken:
            allocator.free.remove(first, count)
        self._being_punched = sum(count for _, count in taken)
        ranges = [(first << bits, count << bits) for first, count in taken]
        try:
            if clusters is allocator.maybe_holes:
                # Space that was set aside and never written to looks like a hole, so what
                # we have used ourselves is punched in any case.
                ranges = [run for run in ranges if await self._holds_data(*run)]
            if ranges:
                await self.prepare_write()
                await self._file.punch(*ranges)
                self._writeback.note_write()
        except BaseException:
            for first, count in taken:
                clusters.add(first, count)
            raise
        finally:
            self._being_punched = 0
            for first, count in taken:
                allocator.free.add(first, count)
        return len(taken)

    def settle(self) -> None:
        """Note that the free clusters are known now, or never will be."""
        self.ready.set()
        if self.pending:
            self._writeback.wake()

    async def _holds_data(self, offset: int, length: int) -> bool:
        """Ask the host whether a range is more than a hole."""
        data = await self._file.next_data(offset)
        return data is not None and data < offset + length

    @property
    def _enough(self) -> int:
        """How much in quarantine is worth a flush, in bytes."""
        share = self._allocator.end // _WORTH_SHARE
        return max(_WORTH_BYTES[0], min(_WORTH_BYTES[1], share))

    def should_reclaim(self) -> bool:
        """Tell whether clusters can be freed that are worth waiting for."""
        if self._being_punched:
            return True
        waiting = self._quarantine.count << self._bits
        return self._allocator.scan_complete and waiting > 0 and waiting > self._enough

    async def reclaim_before_growth(self) -> None:
        """Flush before the file grows, if so much has come into quarantine that it is worth it.

        Requests that the quarantine waits for are not waited for.  Nothing is punched that
        is about to be used.

        Raises:
            HostError: The tables could not be written back.
        """
        if self._being_punched:
            async with self._lock:
                pass
        if not self.should_reclaim():
            return
        if self._quarantine.fresh << self._bits > self._enough:
            await self._writeback.barrier()
        else:
            # Another request may just be making it durable; or it was made so long ago,
            # and perhaps the requests that it waits for have ended.
            await self._writeback.settle()
        await self.run(punches=0)

    async def wait_for_free_clusters(self) -> bool:
        """Wait for what may make clusters free: the scan, or the quarantine.

        Returns:
            Whether something became free meanwhile; others may have taken it.

        Raises:
            HostError: The tables could not be written back.
        """
        if not self.ready.is_set():
            await self.ready.wait()
            return True
        if self._being_punched:
            async with self._lock:
                return True
        if not self._allocator.scan_complete or not self._quarantine.count:
            return False
        before = self._freed
        await self._writeback.flush()
        await self._quarantine.wait()
        await self.run()
        # Others may have put more into quarantine meanwhile, or taken what became free.
        return self._freed != before
