"""Automatic compaction: what becomes of free clusters when a disk is closed.

QEMU has no notion of a free cluster within a file: its check counts one as leaked, and its
driver never uses it again.  So a close moves the highest clusters into the free ones, as
far as that is a matter of a moment, and says what is left.

It happens at a close and not whenever the disk is idle, because it needs the disk for
itself: a write in place takes no lock, and would be lost in a cluster that is just being
copied.  Besides, a guest could have the host copy its clusters again and again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qedfuse.disk.maintenance.compaction import Limits
from qedfuse.errors import QedError

if TYPE_CHECKING:
    from qedfuse.disk.components import Components

log = logging.getLogger(__name__)


class AutoCompaction:
    """Compacts one disk when it is closed, as its options say."""

    def __init__(self, components: Components) -> None:
        """Look after the disk that consists of ``components``."""
        self._components = components
        self._done = False
        self._table_writes: int | None = None
        """How many pieces of tables had been written when the last run ended."""

    async def run(self, *, within_bound: bool = True) -> None:
        """Compact as the options say; what the host refuses costs space and nothing else.

        Does nothing if no table has changed since the last run, which has done what the
        limits allow: what it has left is what was reported.

        No other request may be under way.  See `Compaction.run` for ``within_bound``.
        """
        components, options = self._components, self._components.options
        if not self._is_due() or self._is_up_to_date():
            return
        try:
            if components.writeback.dirty_tables:
                # An error that nobody expects, from here on, must not lose what the guest
                # has written.  A barrier, because a flush would punch what is cut off later.
                await components.writeback.barrier()
            if options.compact == "full":
                await components.first_write_guard.prepare_write()
                await components.scan.run()
                await components.compaction.run(within_bound=within_bound)
            else:
                await self._run_within_limits(within_bound=within_bound)
            # A table that was moved last may be dirty still.
            await components.flusher.flush()
            self._table_writes = components.writeback.statistics().table_writes
        except QedError as error:
            if components.writeback.failure is None:
                log.warning("%s (while compacting)", error)

    async def _run_within_limits(self, *, within_bound: bool) -> None:
        """Compact as far as the limits allow, if the free clusters are known."""
        components, options = self._components, self._components.options
        if components.quarantine.count and not components.scan.finished.is_set():
            # The close would wait for it in any case.
            await components.scan.run()
        if components.allocator.scan_complete and not components.layer.damaged:
            self._done = True
            limits = Limits(options.compact_bytes, options.compact_seconds)
            await components.compaction.run(limits=limits, within_bound=within_bound)

    def _is_up_to_date(self) -> bool:
        """Tell whether the last run ended well, and no table has changed since."""
        writeback = self._components.writeback
        return (
            not writeback.dirty_tables and self._table_writes == writeback.statistics().table_writes
        )

    def _is_due(self) -> bool:
        """Tell whether the options ask for compaction, and automatic one has a reason."""
        components = self._components
        if components.options.compact != "auto":
            return components.options.compact == "full"
        return (
            components.options.discard
            # A list of the free clusters would have nothing to name.
            and not components.persistent_free_list.wanted
            # Reading an image does not rewrite it, however many clusters others leaked.
            and components.writeback.has_changed_tables
        )

    def report(self) -> None:
        """Log what automatic compaction has left, once the file has its final length."""
        components = self._components
        left = components.allocator.free.count
        if self._done and left:
            name = components.file.name
            log.info(
                "%s: %d free clusters (%d bytes) are left within the file, which QEMU's check "
                "counts as leaked: more had to be moved than compact_size and compact_time "
                "allow; to finish: qedimg compact %s",
                name,
                left,
                left << components.allocator.cluster_bits,
                name,
            )
