"""The NEED_CHECK bit: set before the tables change, cleared when they are durable.

This is rule D3 in docs/durability.md.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from qedfuse.errors import QedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.space.filelength import FileLength
    from qedfuse.disk.space.flusher import Flusher
    from qedfuse.disk.space.scan import Scan
    from qedfuse.disk.writeback.headerstore import HeaderStore
    from qedfuse.disk.writeback.metadata import MetadataWriteback

log = logging.getLogger(__name__)


class NeedCheck:
    """Sets NEED_CHECK before the tables of one image change; clears it when they are durable."""

    def __init__(
        self,
        layer: QedLayer,
        header_store: HeaderStore,
        writeback: MetadataWriteback,
        flusher: Flusher,
        length: FileLength,
        scan: Scan,
        delay: float,
    ) -> None:
        """Clear the bit ``delay`` seconds after the last change, while `run` runs."""
        self._layer = layer
        self._header_store = header_store
        self._writeback = writeback
        self._flusher = flusher
        self._length = length
        self._scan = scan
        self._delay = delay
        self._changes_under_way = 0
        self._last_change = trio.current_time()
        self._changed = trio.Event()
        self._has_warned = False
        if header_store.value.need_check:
            self._changed.set()

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Write the bit, unless it is set; the caller may change tables inside the block.

        The bit is written without a datasync.  Nevertheless it is durable before any table changes
        in the file, because each write-back cycle runs a datasync before its first table write.

        Raises:
            HostError: The header could not be written; the block is not entered.
        """
        self._changes_under_way += 1
        try:
            # A bit that another task is still writing, or could not write, does not protect this
            # change.  So this task also calls `HeaderStore.change`, which waits for the other task,
            # and writes the bit if that task has failed.
            if not self.is_set:
                await self._scan.before_table_change()
                await self._header_store.change(lambda header: header.with_need_check(value=True))
                self._writeback.note_write()
            yield
        finally:
            self._changes_under_way -= 1
            self._last_change = trio.current_time()
            self._changed.set()

    @property
    def is_set(self) -> bool:
        """Whether the bit has been written to the file, so tables may change without `changing`.

        The bit need not be durable yet.  False also while the header is being written, and from a
        failed write of the header until the next successful one.
        """
        return self._header_store.value.need_check and self._header_store.persisted

    def note_change(self) -> None:
        """Note a change of a table without `changing`, which is allowed only if `is_set`."""
        self._writeback.note_write()
        self._last_change = trio.current_time()
        self._changed.set()

    @property
    def needs_scan(self) -> bool:
        """Whether the bit must stay set until the scan has read all table entries.

        True if the file is longer than it was at opening, and the scan has not read all entries
        yet.  One of those that it has not read may point past the former end of the file, perhaps
        to a cluster that has been handed out since.  To the next program that opens the image, this
        entry would look valid, and two guest offsets would share the cluster.
        """
        scan = self._scan
        return not scan.entries_validated and self._length.end > scan.end_at_begin

    async def clear(self) -> bool:
        """Make everything durable, then clear the bit; return whether the bit is clear now.

        The bit stays set if the image is damaged, if `needs_scan` is true, if tables are being
        changed, or if the disk has become read-only.  The next flush makes the cleared bit durable.

        Raises:
            QedError: A system call failed; the bit is not cleared (D7).
        """
        await self._flusher.flush()
        if self._layer.damaged:
            # For example, an entry may have pointed past the end of the file, and the file may
            # have grown over its target since.  To the next program that opens the image, the entry
            # would look valid.  So the bit stays set, to demand a check.
            return not self._header_store.value.need_check
        if self._changes_under_way or (
            self._header_store.persisted and not self._header_store.value.need_check
        ):
            return not self._header_store.value.need_check
        # No change is under way, so no request is allocating, and the file can be cut off past
        # the last cluster in use.  If a crash loses the cut and keeps the cleared bit, the
        # clusters past the last one in use are only leaked.  But an entry that the scan has not
        # read may point to one of them, and look valid then.  So the cut must be durable first.
        if await self._length.truncate_tail():
            if self._scan.entries_validated:
                self._writeback.note_write()
            else:
                await self._writeback.barrier()
        # Meanwhile tables may have changed, or damage may have been found.  So `only_if` checks
        # both again.  No other task runs between this check and the start of the write.  The file
        # has its final length now, so `only_if` also checks whether the scan is needed.
        cleared = await self._header_store.change(
            lambda header: header.with_need_check(value=False),
            only_if=lambda: (
                not (
                    self._changes_under_way
                    or self._layer.damaged
                    or self.needs_scan
                    or self._writeback.dirty_tables
                    or self._writeback.failure
                )
            ),
        )
        if cleared:
            self._writeback.note_write()
        elif self._lacks_result and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: NEED_CHECK stays set, because the file has grown and the tables could not be "
                "read completely: the image will be checked before it is opened for writing again",
                self._layer.file.name,
            )
        return cleared

    @property
    def _lacks_result(self) -> bool:
        """Whether `needs_scan` is true although the scan has ended: it could not read a table."""
        return self.needs_scan and self._scan.finished.is_set()

    async def run(self) -> None:
        """Clear the bit when the tables have not changed for ``delay`` seconds; a background task.

        Ends when damage is found while the bit is set, when the bit needs a scan and the scan has
        failed, or when the disk has become read-only.  After an error, which is logged, the
        clearing is tried again.
        """
        last_logged = ""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while trio.current_time() < (due := self._last_change + self._delay):  # noqa: ASYNC110  a change postpones `due`
                await trio.sleep_until(due)
            try:
                if await self.clear():
                    await self._flusher.flush()
                elif self._layer.damaged or self._lacks_result:
                    return
                else:
                    self._changed.set()
                    self._last_change = trio.current_time()
                last_logged = ""
            except QedError as error:
                if str(error) != last_logged:
                    last_logged = str(error)
                    log.error("%s (while clearing NEED_CHECK)", error)  # noqa: TRY400
                if self._writeback.failure is not None:
                    return
                self._last_change = trio.current_time()
                self._changed.set()
