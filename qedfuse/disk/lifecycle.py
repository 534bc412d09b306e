"""From the first look at the tables to the last flush: how a disk is started and closed."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from qedfuse.disk.autocompact import AutoCompaction
from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.parts import Parts


class Lifecycle:
    """Starts the parts of a disk, and brings them to rest.

    Attributes:
        compaction: What makes the file shorter before it is closed.
    """

    def __init__(self, parts: Parts) -> None:
        """Look after ``parts``."""
        self._parts = parts
        self.compaction = AutoCompaction(parts)
        self._started = False
        self._closed = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Start the disk; close it cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            HostError: As `close`.
        """
        in_order = False
        try:
            async with open_scope() as nursery:
                await self.start(nursery)
                try:
                    yield
                    in_order = True
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            # The background tasks have ended: closing has the disk to itself.
            await self.close(compact=in_order)

    async def start(self, nursery: trio.Nursery) -> None:
        """Read what must be known first, and start the background tasks.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            UsageError: A free list is asked for that the image has no room for.
        """
        parts = self._parts
        await parts.layer.scan_l1()
        if parts.file.writable:
            parts.scan.begin()
            await parts.saved_list.open()
            if parts.live.value.need_check:
                # The bit is going to be cleared, which is a change like any other.
                await parts.gate.before_change()
            nursery.start_soon(parts.commit.run)
            nursery.start_soon(parts.needcheck.run)
            nursery.start_soon(parts.scan.run_when_due)
        self._started = True

    async def close(self, *, compact: bool = True) -> None:
        """Make everything durable, clear NEED_CHECK, and let the files and locks go.

        Args:
            compact: Whether to compact first, if the options say so.  Unlike the rest
                that can be cancelled.

        Raises:
            HostError: Something written before could not be made durable (D7).  The
                files are closed all the same, and NEED_CHECK stays.
        """
        if self._closed:
            return
        self._closed = True
        parts = self._parts
        # An image that was refused by `start` is left as it was found.
        writable = parts.file.writable and self._started
        try:
            if compact and writable and parts.commit.failure is None:
                await self.compaction.run()
        except Exception:
            # A bug: nobody knows what the tables in memory are worth now.
            parts.chain.close()
            raise
        except BaseException:
            await self._finish(writable=writable)
            raise
        await self._finish(writable=writable)

    async def _finish(self, *, writable: bool) -> None:
        """Close what is at rest; raise as `close` does."""
        parts = self._parts
        with trio.CancelScope(shield=True):
            try:
                if parts.commit.failure is not None:
                    raise parts.commit.failure.again()
                if writable:
                    await self._give_space_back()
                    await parts.needcheck.clear()
                    await parts.commit.flush()
                    self.compaction.report()
                    await parts.saved_list.save()
            finally:
                parts.chain.close()

    async def _give_space_back(self) -> None:
        """Cut off and punch out what is free, as far as that is known.

        A disk that was not changed is not kept waiting for the scan, unless its free
        clusters are to be listed.
        """
        parts = self._parts
        await parts.commit.flush()
        needed = parts.quarantine.count or parts.saved_list.needs_scan
        if needed and not parts.reclaim.ready.is_set():
            await parts.scan.run()
        if parts.reclaim.pending:
            await parts.reclaim.run(punches=None)
