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

from qedfuse.disk.compaction import Limits
from qedfuse.errors import QedError

if TYPE_CHECKING:
    from qedfuse.disk.parts import Parts

log = logging.getLogger(__name__)


class AutoCompaction:
    """Compacts one disk when it is closed, as its options say."""

    def __init__(self, parts: Parts) -> None:
        """Look after the disk that consists of ``parts``."""
        self._parts = parts
        self._done = False
        self._table_writes: int | None = None
        """How many pieces of tables had been written when the last run ended."""

    async def run(self, *, within_bound: bool = True) -> None:
        """Compact as the options say; what the host refuses costs space and nothing else.

        Does nothing if no table has changed since the last run, which has done what the
        limits allow: what it has left is what was reported.

        No other request may be under way.  See `Compaction.run` for ``within_bound``.
        """
        parts, options = self._parts, self._parts.options
        if not self._is_due() or self._is_up_to_date():
            return
        try:
            if parts.commit.dirty_tables:
                # An error that nobody expects, from here on, must not lose what the guest
                # has written.  A barrier, because a flush would punch what is cut off later.
                await parts.commit.barrier()
            if options.compact == "full":
                await parts.gate.before_change()
                await parts.scan.run()
                await parts.compaction.run(within_bound=within_bound)
            else:
                await self._run_within_limits(within_bound=within_bound)
            # A table that was moved last may be dirty still.
            await parts.commit.flush()
            self._table_writes = parts.commit.statistics().table_writes
        except QedError as error:
            if parts.commit.failure is None:
                log.warning("%s (while compacting)", error)

    async def _run_within_limits(self, *, within_bound: bool) -> None:
        """Compact as far as the limits allow, if the free clusters are known."""
        parts, options = self._parts, self._parts.options
        if parts.quarantine.count and not parts.reclaim.ready.is_set():
            # The close would wait for it in any case.
            await parts.scan.run()
        if parts.allocator.known and not parts.layer.damaged:
            self._done = True
            limits = Limits(options.compact_bytes, options.compact_seconds)
            await parts.compaction.run(limits=limits, within_bound=within_bound)

    def _is_up_to_date(self) -> bool:
        """Tell whether the last run ended well, and no table has changed since."""
        commit = self._parts.commit
        return not commit.dirty_tables and self._table_writes == commit.statistics().table_writes

    def _is_due(self) -> bool:
        """Tell whether the options ask for compaction, and automatic one has a reason."""
        parts = self._parts
        if parts.options.compact != "auto":
            return parts.options.compact == "full"
        return (
            parts.options.discard
            # A list of the free clusters would have nothing to name.
            and not parts.saved_list.wanted
            # Reading an image does not rewrite it, however many clusters others leaked.
            and parts.commit.has_changed_tables
        )

    def report(self) -> None:
        """Log what automatic compaction has left, once the file has its final length."""
        parts = self._parts
        left = parts.allocator.free.count
        if self._done and left:
            name = parts.file.name
            log.info(
                "%s: %d free clusters (%d bytes) are left within the file, which QEMU's check "
                "counts as leaked: more had to be moved than compact_size and compact_time "
                "allow; to finish: qedimg compact %s",
                name,
                left,
                left << parts.allocator.cluster_bits,
                name,
            )
