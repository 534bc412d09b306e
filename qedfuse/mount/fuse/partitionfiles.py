"""Keeping the files of partitions in step with the partition tables of their disks.

A program can write a different partition table through the file of a disk.  So after the last
writer has closed that file, the next lookup or open of a file of this disk, or opendir, reads the
table again.  While a partition is open, the disk has no writer, so an open partition keeps its
start and its size.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import QedError
from qedfuse.mount.images.naming import PARTITION_INFIX

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
        # Each disk has its own lock, because a read of one table can take any length of time.
        self._locks = {id(disk): trio.Lock() for disk in disks.whole_disks}
        self._being_read: set[ExportedDisk] = set()
        # The disks whose tables could not be read, and the time of the next attempt; infinity while
        # an attempt is due or under way.
        self._unread: dict[ExportedDisk, float] = {}

    async def refresh(self) -> None:
        """Do what `refresh_disk` does for all disks, one after the other.

        No other task runs between the last test for outdated tables and the return.
        """
        self._retry_unread()
        while pending := self._disks.outdated | self._being_read:
            for whole in pending:
                await self._read_outdated(whole)

    async def refresh_disk(self, exported: ExportedDisk) -> None:
        """Read an outdated table until the files of partitions agree with the table.

        A disk whose table cannot be read has no files of partitions.  The first call at least
        `_RETRY_SECONDS` after the failed attempt reads the table again.

        No other task runs between the last test for an outdated table and the return.

        Args:
            exported: A file of the disk.
        """
        self._retry_unread()
        await self._read_outdated(self._disks.files_of(exported.whole_disk)[0])

    async def refresh_name(self, name: bytes) -> None:
        """Do what `refresh_disk` does for the disk of a partition whose file may have a name.

        Do nothing for any other name.  So a lookup does not wait for the tables of other disks.
        """
        whole = self._disks.by_name.get(name.rpartition(PARTITION_INFIX)[0])
        if whole is not None:
            await self.refresh_disk(whole)

    def _retry_unread(self) -> None:
        """Mark as outdated each disk whose table could not be read, if its next attempt is due."""
        if not self._unread:
            return
        now = trio.current_time()
        for whole, retry_time in self._unread.items():
            if retry_time <= now:
                self._unread[whole] = math.inf
                self._disks.outdated.add(whole)

    async def _read_outdated(self, whole: ExportedDisk) -> None:
        """Read the table of a disk until it is not outdated, and no other task is reading it."""
        # A task that releases the lock hands it over to a waiter.  If the loop tested the lock
        # instead of `_being_read`, two tasks would hand the lock to each other forever.
        while whole in self._disks.outdated or whole in self._being_read:
            async with self._locks[id(whole.whole_disk)]:
                while whole in self._disks.outdated:
                    self._being_read.add(whole)
                    try:
                        await self._read_table(whole)
                    finally:
                        self._being_read.remove(whole)

    async def _read_table(self, whole: ExportedDisk) -> None:
        """Read the table of a disk that is outdated; the caller holds the lock of the disk."""
        # Few mounts need the parsers of partition tables.
        from qedfuse.mount.images.partitionwindows import read_windows  # noqa: PLC0415  late

        # If a writer of the disk ends while the table is read, the disk becomes outdated again.
        self._disks.outdated.remove(whole)
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
        marks = exported.stale_marks
        if await self._try_drop_pages(exported):
            exported.dropped_marks = max(exported.dropped_marks, marks)
        # A write that has failed meanwhile has marked the file again.
        return not exported.is_stale
