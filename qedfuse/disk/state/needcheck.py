"""The NEED_CHECK bit: set before the tables change, cleared when all is durable (D3)."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import QedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.disk.space.scan import Scan
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback

log = logging.getLogger(__name__)


class NeedCheck:
    """Keeps the bit true to the state of the tables."""

    def __init__(
        self,
        layer: QedLayer,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        allocator: Allocator,
        scan: Scan,
        delay: float,
    ) -> None:
        """Watch over an image; clear the bit ``delay`` seconds after the last change.

        ``scan`` is told before the first change.
        """
        self._layer = layer
        self._header_store = header_store
        self._writeback = writeback
        self._allocator = allocator
        self._scan = scan
        self._delay = delay
        self._under_way = 0
        self._last_change = trio.current_time()
        self._changed = trio.Event()
        if header_store.value.need_check:
            self._changed.set()

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Change tables inside the ``async with`` block.

        The bit is written, not yet synced, before the block is entered: the first
        datasync of a commit comes before its first table write and covers both.
        """
        self._under_way += 1
        try:
            # A bit that is still being written by somebody else, or could not be, does
            # not protect our change yet.
            if not self.is_set:
                await self._scan.before_table_change()
                await self._header_store.change(lambda header: header.with_need_check(value=True))
                self._writeback.note_write()
            yield
        finally:
            self._under_way -= 1
            self._last_change = trio.current_time()
            self._changed.set()

    @property
    def is_set(self) -> bool:
        """Whether tables may change at once: the bit is in the file, if not durable yet."""
        return self._header_store.value.need_check and self._header_store.persisted

    def note_change(self) -> None:
        """Note that a table was changed at once, while the bit `is_set`."""
        self._writeback.note_write()
        self._last_change = trio.current_time()
        self._changed.set()

    async def clear(self) -> bool:
        """Make everything durable, then clear the bit, unless a change came in between.

        Returns:
            Whether the bit is clear now.

        Raises:
            QedError: Not everything could be made durable; the bit stays (D7).
        """
        await self._writeback.flush()
        if self._layer.damaged:
            # A wild entry that we know of would look right to whoever opens the image
            # next, once the file has grown over the place that it points to.  The check
            # that the bit asks for finds it out.
            return not self._header_store.value.need_check
        if self._under_way or (
            self._header_store.persisted and not self._header_store.value.need_check
        ):
            return not self._header_store.value.need_check
        # Nothing is being allocated, so what lies past the last cluster is ours to cut.
        # If a crash loses the cut and keeps the cleared bit, a leak is left, no worse.
        await self._allocator.truncate_tail()
        cleared = await self._header_store.change(
            lambda header: header.with_need_check(value=False),
            only_if=lambda: (
                not (self._under_way or self._writeback.dirty_tables or self._writeback.failure)
            ),
        )
        self._writeback.note_write()
        return cleared

    async def run(self) -> None:
        """Clear the bit when the image has been idle for a while; a background task."""
        complaint = ""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while trio.current_time() < (due := self._last_change + self._delay):  # noqa: ASYNC110  it moves while we sleep
                await trio.sleep_until(due)
            try:
                if await self.clear():
                    await self._writeback.flush()
                elif self._layer.damaged:
                    return
                else:
                    self._changed.set()
                    self._last_change = trio.current_time()
                complaint = ""
            except QedError as error:
                if str(error) != complaint:
                    complaint = str(error)
                    log.error("%s (while clearing NEED_CHECK)", error)  # noqa: TRY400
                if self._writeback.failure is not None:
                    return
                self._last_change = trio.current_time()
                self._changed.set()
