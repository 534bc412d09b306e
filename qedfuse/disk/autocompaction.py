"""Automatic compaction: moving clusters into free ones when a disk is closed.

QEMU has no notion of free clusters within a file.  QEMU's check counts each of them as leaked,
and QEMU's driver never uses them again.  So when a disk is closed, its highest clusters can be
moved into free ones; the option `OpenOptions.compact` decides whether.  With ``auto`` the
options `compact_seconds` and `compact_bytes` limit the moves, and the number of free clusters
that are left is logged.  With ``full`` there are no such limits.

Compaction does not run while the disk is in use, because a write could be lost: a write in place
takes no lock, and could change a cluster whose old content a move has already copied.
Besides, a guest could make the host copy its clusters again and again.
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
        """How often tables had been written when the last successful run ended; None if no run
        has succeeded yet."""

    async def run(self, *, within_bound: bool = True) -> None:
        """Compact as the options say, and make the result durable.

        Does nothing if compaction is not due (`_is_due`).  Also does nothing if an earlier run has
        succeeded and no table has changed since, because each run moves clusters, as many as the
        limits allow.  The caller must ensure that no request is running.

        A `QedError` ends the run, and the file may then keep free clusters.  The error is logged as
        a warning and not raised.  If the error has made the disk read-only, nothing is logged,
        because the close raises that error.  See `Compaction.run` for ``within_bound``.
        """
        components, options = self._components, self._components.options
        if not self._is_due() or self._is_up_to_date():
            return
        try:
            if components.writeback.dirty_tables:
                # First make durable what the guest has written, so that a bug in the compaction
                # cannot lose those writes.  A barrier is used and not a flush, because a flush
                # would punch free clusters that the compaction fills or cuts off anyway.
                await components.writeback.barrier()
            if options.compact == "full":
                await components.first_write_guard.prepare_write()
                await components.scan.run()
                await components.compaction.run(within_bound=within_bound)
            else:
                await self._run_within_limits(within_bound=within_bound)
            # The table entries of the last moves may still be in memory only, so flush.
            await components.flusher.flush()
            self._table_writes_at_last_run = components.writeback.statistics().table_writes
        except QedError as error:
            if components.writeback.failure is None:
                log.warning("%s (while compacting)", error)

    async def _run_within_limits(self, *, within_bound: bool) -> None:
        """Compact as far as the limits of the options allow.

        Moves nothing if the scan for free clusters has not succeeded, or if the image is damaged.

        Raises:
            QedError: A system call failed.
        """
        components, options = self._components, self._components.options
        if components.quarantine.count and not components.scan.finished.is_set():
            # Clusters in quarantine have lost their reference, and are not free yet.  If there are
            # any, the close runs the scan anyway, so here the scan costs no extra time.
            await components.scan.run()
        if components.allocator.scan_complete and not components.layer.damaged:
            self._has_run_within_limits = True
            limits = Limits(options.compact_bytes, options.compact_seconds)
            await components.compaction.run(limits=limits, within_bound=within_bound)

    def _is_up_to_date(self) -> bool:
        """Return whether a run has succeeded, and no table has changed since the last such run."""
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
            # If the image keeps a free list, the disk can use the listed free clusters again
            # after the next open.  So the close need not fill them or cut them off.
            and not components.persistent_free_list.wanted
            # Reading an image must not rewrite it, however many clusters are leaked in it.
            and components.writeback.has_changed_tables
        )

    def report(self) -> None:
        """Log how many free clusters a compaction within limits has left.

        Logs nothing if no free cluster is left, or if no such compaction has run.  The caller must
        call this method after the file has got its final length.
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
