"""Serving a mount: from mounting until the connection to the kernel is closed.

After a failure of the server the mountpoint is left dead (ENOTCONN) on purpose.  An unmount
would show the empty directory beneath, and a backup program would take that for the content.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import QedError
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.attach import attach
from qedfuse.mount.fuse.fallocate import FallocateLseek
from qedfuse.mount.fuse.fuseinit import negotiate_init
from qedfuse.mount.fuse.laundering import Laundering
from qedfuse.mount.fuse.operations import Operations
from qedfuse.mount.fuse.scheduler import scheduled
from qedfuse.mount.fuse.sizefixup import SizeFixup
from qedfuse.mount.fuse.truncation import Truncation
from qedfuse.mount.process.heaptrimmer import HeapTrimmer
from qedfuse.mount.shutdown import Shutdown
from qedfuse.mount.system.mountpoint import check_not_mounted
from qedfuse.mount.system.mountpointlock import (
    find_new_mount,
    mountpoint_locked,
    refuse_to_cover,
)
from qedfuse.mount.system.mounttable import find_mount, read_mounts
from qedfuse.mount.system.readahead import readahead_bytes, set_readahead
from qedfuse.mount.system.unmount import unmount
from qedfuse.text import printable
from qedfuse.util.backgroundtasks import background_tasks

if TYPE_CHECKING:
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
    from qedfuse.mount.fuse.launderer import Launderer
    from qedfuse.mount.options import MountOptions
    from qedfuse.mount.process.announcement import Announcement
    from qedfuse.mount.process.signals import SignalDispatcher
    from qedfuse.mount.system.mounttable import MountEntry

_log = logging.getLogger(__name__)

_MIN_TASKS: Final = 16
"""Tasks of pyfuse3 that wait for requests and are kept: to start a task costs as much as to
answer several requests."""


class Server:
    """Serves the disks of one mount."""

    def __init__(
        self,
        disks: ExportedDisks,
        options: MountOptions,
        mountpoint: str,
        launderer: Launderer | None,
        *,
        directory: bool,
    ) -> None:
        """Build the handlers of requests; nothing is mounted yet.

        Args:
            disks: The disks.
            options: The options of the mount.
            mountpoint: The mountpoint, absolute and free of symbolic links.
            launderer: The helper process; None if there is none.
            directory: Whether the mountpoint is a directory.
        """
        self._disks = disks
        self._options = options
        self._mountpoint = mountpoint
        self._laundering = Laundering(launderer)
        self._size_fixup = SizeFixup(mountpoint)
        truncation = Truncation(options, self._laundering.try_drop_pages)
        self._operations = Operations(
            *(disks, options, truncation, self._size_fixup), directory=directory
        )
        self._is_ready = False

    async def run(
        self,
        source: str,
        lock_name: bytes | None,
        signals: SignalDispatcher,
        announcement: Announcement,
        unprotected: str | None,
    ) -> QedError | None:
        """Mount, serve until the mount is gone, and close the connection.

        Args:
            source: The source that the mount table shows.
            lock_name: The name of the mountpoint's lock.
            signals: Passes signals to the shutdown while the disks are served, and after that
                to the compaction of the disks.
            announcement: Where the mount is announced.
            unprotected: Why the process is not protected from memory pressure, for the log;
                None if it is.

        Returns:
            None, or why a forced unmount has lost data.

        Raises:
            QedError: It cannot be mounted or announced; then nothing stays mounted.
        """
        mountpoint = self._mountpoint
        async with mountpoint_locked(lock_name):
            # Another qedfuse may have mounted while the images were opened.
            check_not_mounted(mountpoint)
            before = read_mounts()
            connection = attach(self._operations, mountpoint, self._options, source)
        entry = None
        self._laundering.connect(connection)
        try:
            entry = find_new_mount(mountpoint, before, connection)
            refuse_to_cover(entry)
            with scheduled(self._options.poll_seconds):
                await negotiate_init(connection, readahead_bytes(self._options.readahead))
                return await self._serve(entry, signals, announcement, unprotected)
        finally:
            extraops.end()
            for exported in self._disks:
                exported.disk.when_flushed(lambda: None)
            self._laundering.stop()
            # Without an entry libfuse has to unmount, because `_undo_mount` cannot.
            pyfuse3.close(unmount=entry is None)
            self._laundering.wait()
            if entry is not None and not self._is_ready:
                # The mount was never announced, so no program loses anything by the unmount.
                _undo_mount(entry)

    async def _serve(
        self,
        entry: MountEntry,
        signals: SignalDispatcher,
        announcement: Announcement,
        unprotected: str | None,
    ) -> QedError | None:
        """Announce the mount and answer requests until it is gone; the result is that of `run`."""
        options, operations = self._options, self._operations
        announcement.write_record(entry.device)
        wrong_readahead = set_readahead(entry.device, options.readahead)
        if wrong_readahead is not None and options.readahead is not None:
            # Before the mount is ready, when the user who set the option still reads stderr.
            _log.warning("%s: option readahead: %s", printable(self._mountpoint), wrong_readahead)
        writeback_cache = operations.enable_writeback_cache
        async with background_tasks() as nursery:
            nursery.start_soon(operations.errors.log_summaries)
            if writeback_cache or options.truncate == "zero":
                nursery.start_soon(self._size_fixup.run, entry.device)
            trim = HeapTrimmer()
            for exported in self._disks:
                exported.disk.when_flushed(partial(_after_flush, exported, trim))
            missing = extraops.serve(
                FallocateLseek(operations, self._laundering, self._size_fixup, nursery)
            )
            if missing is not None:
                _log.warning("without fallocate and lseek: discards free nothing: %s", missing)
            laundering = self._laundering if writeback_cache else None
            shutdown = Shutdown(self._disks, laundering, self._mountpoint, entry.device, nursery)
            signals.handle_with(shutdown.receive)
            try:
                # An earlier signal has cancelled this task by now.
                await trio.lowlevel.checkpoint_if_cancelled()
                announcement.ready()
                self._is_ready = True
                self._log_limits(wrong_readahead, unprotected)
                await pyfuse3.main(min_tasks=_MIN_TASKS)
            finally:
                signals.handle_with(lambda _name: self._disks.stop_compacting())
            announcement.stopping()
            nursery.cancel_scope.cancel()
        return shutdown.failure

    def _log_limits(self, wrong_readahead: str | None, unprotected: str | None) -> None:
        """Log what the kernel has refused to the process, once for the mount."""
        shown = printable(self._mountpoint)
        if wrong_readahead is not None and self._options.readahead is None:
            # Only for the log: an ordinary user can do nothing about it.
            _log.info("%s: %s", shown, wrong_readahead)
        if unprotected is not None and not self._options.read_only:
            # Root can grant the privilege.
            level = logging.INFO if os.geteuid() else logging.WARNING
            _log.log(level, "%s: %s", shown, unprotected)


def _after_flush(exported: ExportedDisk, trim: HeapTrimmer) -> None:
    """Do the work that may wait until a flush has ended."""
    trim()
    _invalidate_blocks(exported)


def _invalidate_blocks(exported: ExportedDisk) -> None:
    """Have the kernel request the attributes again if it has cached a wrong ``st_blocks``."""
    if exported.blocks >= 0 and exported.disk.fstat().st_blocks != exported.blocks:
        exported.blocks = -1
        with suppress(OSError):  # the kernel may not know the inode
            pyfuse3.invalidate_inode(exported.inode, attr_only=True)


def _undo_mount(mount: MountEntry) -> None:
    """Unmount a mount that was never announced, unless another one covers it by now."""
    now = find_mount(mount.path)
    if now is None or now.mount_id != mount.mount_id:
        return
    try:
        unmount(mount.path, lazy=True)
    except QedError as error:
        _log.warning("%s", error)
