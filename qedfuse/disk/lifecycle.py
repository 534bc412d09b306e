"""From the first look at the tables to the last flush: how a disk is started and closed."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import HostError
from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from qedfuse.disk.parts import Parts

log = logging.getLogger(__name__)


class Lifecycle:
    """Starts the parts of a disk, and brings them to rest."""

    def __init__(self, parts: Parts, compact: Callable[[], Awaitable[object]]) -> None:
        """Look after ``parts``; ``compact`` makes the file short, where that is asked for."""
        self._parts = parts
        self._compact = compact
        self._started = False
        self._closed = False

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Start the disk; close it cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            HostError: As `close`.
        """
        try:
            async with open_scope() as nursery:
                await self.start(nursery)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            # The background tasks have ended: closing has the disk to itself.
            await self.close()

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

    async def close(self) -> None:
        """Make everything durable, clear NEED_CHECK, and let the files and locks go.

        Raises:
            HostError: Something written before could not be made durable (D7).  The
                files are closed all the same, and NEED_CHECK stays.
        """
        if self._closed:
            return
        self._closed = True
        parts = self._parts
        with trio.CancelScope(shield=True):
            try:
                if parts.commit.failure is not None:
                    raise parts.commit.failure.again()
                # An image that was refused by `start` is left as it was found.
                if parts.file.writable and self._started:
                    if parts.options.compact:
                        await self._compact_at_close()
                    await self._give_space_back()
                    await parts.needcheck.clear()
                    await parts.commit.flush()
                    await parts.saved_list.save()
            finally:
                parts.chain.close()

    async def _compact_at_close(self) -> None:
        """Compact; what the host refuses costs space and nothing else."""
        try:
            await self._compact()
        except HostError as error:
            log.warning("%s (while compacting)", error)

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
