"""Starting a disk and closing it cleanly: everything between opening and closing its files."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from qedfuse.disk.autocompaction import AutoCompaction
from qedfuse.util.backgroundtasks import background_tasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.components import Components


class Lifecycle:
    """Starts the components of one disk, and stops them.

    Attributes:
        autocompaction: Makes the file shorter before it is closed.
    """

    def __init__(self, components: Components) -> None:
        """Manage ``components``, which have not been started."""
        self._components = components
        self.autocompaction = AutoCompaction(components)
        self._started = False
        self._closed = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Start the disk; close it cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            UsageError: A free list is requested, but the bytes for its descriptor are in use.
            HostError: The host refused at the start, or something written could not be made
                durable at the close (D7).  The files are closed nevertheless.
        """
        succeeded = False
        try:
            async with background_tasks() as nursery:
                await self.start(nursery)
                try:
                    yield
                    succeeded = True
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            # The background tasks have ended, so no other task uses the disk.
            await self.close(compact=succeeded)

    async def start(self, nursery: trio.Nursery) -> None:
        """Read the L1 table and the free list, and start the background tasks.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            UsageError: A free list is requested, but the bytes for its descriptor are in use.
            HostError: The host refused.
        """
        components = self._components
        await components.layer.scan_l1()
        if components.file.writable:
            components.scan.begin()
            await components.persistent_free_list.open()
            if components.header_store.value.need_check:
                # `NeedCheck.run` will clear the bit, which is a modification.
                await components.first_write_guard.prepare_write()
            nursery.start_soon(components.flusher.run)
            nursery.start_soon(components.needcheck.run)
            nursery.start_soon(components.scan.run_when_due)
        self._started = True

    async def close(self, *, compact: bool = True) -> None:
        """Make everything durable, clear NEED_CHECK, close the files and release the locks.

        A second call does nothing.

        Args:
            compact: Whether to compact first, as the options say.  Only that part of the
                close can be cancelled.

        Raises:
            HostError: Something written before could not be made durable (D7).  The
                files are closed nevertheless, and NEED_CHECK stays set.
        """
        if self._closed:
            return
        self._closed = True
        components = self._components
        # An image that `start` refused stays unchanged.
        writable = components.file.writable and self._started
        try:
            if compact and writable and components.writeback.failure is None:
                await self.autocompaction.run()
        except Exception:
            # Compaction logs expected errors, so this is a bug.  The tables in memory may be
            # wrong, so close the files without writing the tables.
            components.chain.close()
            raise
        except BaseException:
            # A compaction that was cancelled or interrupted leaves a sound image.
            await self._finish(writable=writable)
            raise
        await self._finish(writable=writable)

    async def _finish(self, *, writable: bool) -> None:
        """Make everything durable, if ``writable``, and close the files.

        Raises:
            HostError: As `close`.
        """
        components = self._components
        with trio.CancelScope(shield=True):
            try:
                if components.writeback.failure is not None:
                    raise components.writeback.failure.again()
                if writable:
                    await self._give_space_back()
                    await components.needcheck.clear()
                    await components.flusher.flush()
                    self.autocompaction.report()
                    await components.persistent_free_list.save()
            finally:
                components.chain.close()

    async def _give_space_back(self) -> None:
        """Cut off and punch out all free clusters that are known.

        Waits for the scan first if clusters are in quarantine, or if a free list must be
        written that needs the scan.  Otherwise the close of an unchanged disk need not wait.
        """
        components = self._components
        await components.flusher.flush()
        needed = components.quarantine.count or components.persistent_free_list.needs_scan
        if needed and not components.scan.finished.is_set():
            await components.scan.run()
        if components.reclaim.pending:
            await components.reclaim.run(max_runs=None)
