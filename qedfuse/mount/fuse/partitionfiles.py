"""Keeping the files of partitions in step with the partition tables of their disks.

A program can write a different partition table through the file of a disk.  So after the last
writer has closed that file, the next lookup, open or opendir reads the table again.  While a
partition is open, the disk has no writer, so an open partition keeps its start and its size.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import QedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks

_log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 5.0
"""Time between a failed attempt to read a table and the next attempt, unless the last writer of the
disk closes it: then the table is read anew."""


class PartitionFiles:
    """Updates the files of partitions, and makes the kernel drop stale pages of files."""

    def __init__(
        self,
        disks: ExportedDisks,
        try_drop_pages: Callable[[ExportedDisk], Awaitable[bool]],
        files_changed: Callable[[], object],
    ) -> None:
        """Prepare to update the files in ``disks``.

        Args:
            disks: The disks.
            try_drop_pages: Makes the kernel drop all its cached pages of a file; returns False if
                some may be left.
            files_changed: Called after files were added or removed.
        """
        self._disks = disks
        self._try_drop_pages = try_drop_pages
        self._files_changed = files_changed
        self._lock = trio.Lock()
        self._is_reading = False
        # The disks whose tables could not be read, and the time of the next attempt; infinity while
        # an attempt is due or under way.
        self._unread: dict[ExportedDisk, float] = {}

    async def refresh(self) -> None:
        """Read outdated tables until the files of all partitions agree with the tables.

        A disk whose table cannot be read has no files of partitions.  The first call at least
        `_RETRY_SECONDS` after the failed attempt reads the table again.

        No other task runs between the last test for outdated tables and the return.
        """
        if self._unread:
            self._retry_unread()
        # A task that releases the lock hands it over to a waiter.  If the loop tested the lock
        # instead of `_is_reading`, two tasks would hand the lock to each other forever.
        while self._disks.outdated or self._is_reading:
            async with self._lock:
                self._is_reading = True
                try:
                    await self._read_outdated()
                finally:
                    self._is_reading = False

    def _retry_unread(self) -> None:
        """Mark as outdated each disk whose table could not be read, if its next attempt is due."""
        now = trio.current_time()
        for whole, retry_time in self._unread.items():
            if retry_time <= now:
                self._unread[whole] = math.inf
                self._disks.outdated.add(whole)

    async def _read_outdated(self) -> None:
        """Read the tables of all disks that are outdated; the caller holds the lock."""
        # Few mounts need the parsers of partition tables.
        from qedfuse.mount.images.partitionwindows import read_windows  # noqa: PLC0415  late

        while self._disks.outdated:
            # If a writer of the disk ends while the table is read, the disk becomes outdated again.
            whole = self._disks.outdated.pop()
            try:
                windows = await read_windows(whole.whole_disk, whole.name)
            except QedError as error:
                windows = {}
                if whole not in self._unread:
                    name = whole.whole_disk.name
                    _log.warning("%s: cannot read the partition table: %s", name, error)
                self._unread[whole] = trio.current_time() + _RETRY_SECONDS
            else:
                self._unread.pop(whole, None)
            if self._disks.set_partitions(whole, windows):
                self._files_changed()

    async def drop_stale_pages(self, exported: ExportedDisk) -> bool:
        """Make the kernel drop the pages of a file if they may differ from the disk.

        The caller, which handles an open, must have counted a handle of the file, so that no other
        file with the same bytes can be written to during the call.

        Returns:
            False if the kernel may still have a page that differs; the reply to the open must then
            make the kernel drop all pages.
        """
        if not exported.is_stale:
            return True
        if not await self._try_drop_pages(exported):
            return False
        exported.is_stale = False
        return True
