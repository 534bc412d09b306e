"""From the first look at the tables to the last flush: how a disk is started and closed."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from qedfuse.disk.autocompaction import AutoCompaction
from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.components import Components


class Lifecycle:
    """Starts the parts of a disk, and brings them to rest.

    Attributes:
        compaction: What makes the file shorter before it is closed.
    """

    def __init__(self, components: Components) -> None:
        """Look after ``components``."""
        self._components = components
        self.compaction = AutoCompaction(components)
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
        components = self._components
        await components.layer.scan_l1()
        if components.file.writable:
            components.scan.begin()
            await components.persistent_free_list.open()
            if components.header_store.value.need_check:
                # The bit is going to be cleared, which is a change like any other.
                await components.first_write_guard.prepare_write()
            nursery.start_soon(components.flusher.run)
            nursery.start_soon(components.needcheck.run)
            nursery.start_soon(components.scan.run_when_due)
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
        components = self._components
        # An image that was refused by `start` is left as it was found.
        writable = components.file.writable and self._started
        try:
            if compact and writable and components.writeback.failure is None:
                await self.compaction.run()
        except Exception:
            # A bug: nobody knows what the tables in memory are worth now.
            components.chain.close()
            raise
        except BaseException:
            await self._finish(writable=writable)
            raise
        await self._finish(writable=writable)

    async def _finish(self, *, writable: bool) -> None:
        """Close what is at rest; raise as `close` does."""
        components = self._components
        with trio.CancelScope(shield=True):
            try:
                if components.writeback.failure is not None:
                    raise components.writeback.failure.again()
                if writable:
                    await self._give_space_back()
                    await components.needcheck.clear()
                    await components.flusher.flush()
                    self.compaction.report()
                    await components.persistent_free_list.save()
            finally:
                components.chain.close()

    async def _give_space_back(self) -> None:
        """Cut off and punch out what is free, as far as that is known.

        A disk that was not changed is not kept waiting for the scan, unless its free
        clusters are to be listed.
        """
        components = self._components
        await components.flusher.flush()
        needed = components.quarantine.count or components.persistent_free_list.needs_scan
        if needed and not components.scan.finished.is_set():
            await components.scan.run()
        if components.reclaim.pending:
            await components.reclaim.run(punches=None)
