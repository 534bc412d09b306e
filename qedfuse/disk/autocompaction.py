"""Automatic compaction: moving clusters into free ones when a disk is closed.

QEMU's check counts free clusters within a file as leaked, and QEMU's driver never uses them again.
So when a disk is closed, its highest clusters can be moved into free ones, as the option
`OpenOptions.compact` says.  With ``auto`` the options `compact_seconds` and `compact_bytes` limit
the moves.

Compaction does not run while the disk is in use, because a write could be lost: a write in place
takes no lock, and could change a cluster whose old content a move has already copied.
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
    """Compacts one disk when the disk is closed or shortly before, if its options say so."""

    def __init__(self, components: Components) -> None:
        """Prepare to compact the disk that consists of ``components``."""
        self._components = components
        self._has_run_within_limits = False
        self._table_writes_at_last_run: int | None = None
        """How often tables had been written when the last successful run ended, or None."""

    async def run(self, *, within_bound: bool = True) -> None:
        """Compact as the options say, and make the result durable.

        Does nothing if compaction is not due (`_is_due`), or if no table has changed since a run
        that has succeeded.  No request may be running.

        A `QedError` ends the run and is logged.  But an error that has made the disk read-only is
        not logged here, because the close of the disk raises it.  See `Compaction.run` for
        ``within_bound``.
        """
        components, options = self._components, self._components.options
        if not self._is_due() or self._is_up_to_date():
            return
        try:
            if components.writeback.dirty_tables:
                # First make durable what the guest has written, so that a bug in the compaction
                # cannot lose it.  A barrier suffices.  A flush would also punch free clusters,
                # which the compaction fills or cuts off anyway.
                await components.writeback.barrier()
            if options.compact == "full":
                await components.first_write_guard.prepare_write()
                await components.scan.run()
                await components.compaction.run(within_bound=within_bound)
            else:
                await self._run_within_limits(within_bound=within_bound)
            # The table entries of the last moves may still be in memory only.
            await components.flusher.flush()
            self._table_writes_at_last_run = components.writeback.statistics().table_writes
        except QedError as error:
            if components.writeback.failure is None:
                log.warning("%s (while compacting)", error)

    async def _run_within_limits(self, *, within_bound: bool) -> None:
        """Compact as far as the limits allow, if the scan is complete and the image undamaged."""
        components, options = self._components, self._components.options
        if components.needs_scan_at_close:
            # Clusters in quarantine become free only after the scan.  As the close needs the scan
            # anyway, it costs no extra time here.
            await components.scan.run()
        if components.allocator.scan_complete and not components.layer.damaged:
            self._has_run_within_limits = True
            limits = Limits(options.compact_bytes, options.compact_seconds)
            await components.compaction.run(limits=limits, within_bound=within_bound)

    def _is_up_to_date(self) -> bool:
        """Return whether no table has changed since a run that has succeeded."""
        writeback = self._components.writeback
        table_writes = writeback.statistics().table_writes
        return not writeback.dirty_tables and self._table_writes_at_last_run == table_writes

    def _is_due(self) -> bool:
        """Return whether to compact: always with ``full``, if useful with ``auto``, else never."""
        components = self._components
        if components.options.compact != "auto":
            return components.options.compact == "full"
        return (
            # With ``discard`` False, the user wants clusters to stay where they are.
            components.options.discard
            # After the next open, the disk can use the free clusters of a persistent list again.
            and not components.persistent_free_list.wanted
            # Reading an image must not rewrite it, however many clusters are leaked in it.
            and components.writeback.has_changed_tables
        )

    def report(self) -> None:
        """Log how many free clusters a compaction within limits has left, if any.

        The file must have its final length.
        """
        components = self._components
        left = components.allocator.free.count
        if self._has_run_within_limits and left:
            name = components.file.name
            log.info(
                "%s: %d free clusters (%d bytes) are left within the file; QEMU's check counts "
                "these clusters as leaked; to remove them: qedimg compact %s",
                name,
                left,
                left << components.allocator.cluster_bits,
                name,
            )
