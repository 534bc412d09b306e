"""Starting a disk whose files are open, and closing the disk cleanly, with its files.

D7 is a rule in docs/durability.md.
"""

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
        autocompaction: Moves clusters down, to make the file shorter, before the file is closed.
    """

    def __init__(self, components: Components) -> None:
        """Manage ``components``, which have not been started."""
        self._components = components
        self.autocompaction = AutoCompaction(components)
        self._started = False
        self._closed = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Start the disk; close the disk cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image is open for writing, and two of its L2 tables overlap.
            UsageError: A free list is requested, but other data lies where its descriptor must be.
            HostError: The host refused an access, or data could not be made durable (D7).

        After any error the files are closed.
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
            # No other task uses the disk any more, so `close` may compact; after an error it does
            # not.
            await self.close(compact=succeeded)

    async def start(self, nursery: trio.Nursery) -> None:
        """Read the L1 table; if the file is writable, read the free list and start the tasks.

        Raises:
            QedError: See `serving`.
        """
        components = self._components
        await components.layer.scan_l1()
        if components.file.writable:
            components.scan.begin()
            await components.persistent_free_list.open()
            if components.header_store.value.need_check:
                # `NeedCheck.run` will modify the image without a call of `prepare_write`.
                await components.first_write_guard.prepare_write()
            nursery.start_soon(components.flusher.run)
            nursery.start_soon(components.needcheck.run)
            nursery.start_soon(components.scan.run_when_due)
        self._started = True

    async def close(self, *, compact: bool = True) -> None:
        """Make everything durable, clear NEED_CHECK, close the files and release the locks.

        A second call does nothing.  Only the compaction can be cancelled.  NEED_CHECK stays set if
        the image is damaged.

        Args:
            compact: Whether to compact first if the options ask for a compaction.

        Raises:
            HostError: A system call failed, or data could not be made durable (D7).  The files are
                closed nevertheless.
        """
        if self._closed:
            return
        self._closed = True
        components = self._components
        # If `start` has not succeeded, the close writes nothing to the file.
        writable = components.file.writable and self._started
        try:
            if compact and writable and components.writeback.failure is None:
                await self.autocompaction.run()
        except Exception:
            # Compaction logs all expected errors, so this is a bug, and the tables in memory may be
            # wrong.  Hence the files are closed without writing the tables.
            components.chain.close()
            raise
        except BaseException:
            # A cancelled compaction leaves a sound image, so the close goes on as usual.
            await self._finish(writable=writable)
            raise
        await self._finish(writable=writable)

    async def _finish(self, *, writable: bool) -> None:
        """Make everything durable, if ``writable``, and close the files in any case."""
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

        Clusters that have lost their reference are in quarantine first.  `Reclaim.run` frees them
        only after the scan for free clusters has ended, so this method completes it if need be.
        """
        components = self._components
        await components.flusher.flush()
        if components.needs_scan_at_close:
            await components.scan.run()
        if components.reclaim.pending:
            await components.reclaim.run(max_runs=None)
