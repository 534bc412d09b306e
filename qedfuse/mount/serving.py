"""Serving a mount: from mounting until the connection to the kernel is closed.

If the server fails after the mount was announced, the mount stays, and each access fails with
ENOTCONN.  If the mount were undone, a backup program would find the empty directory beneath it,
and would store an empty backup without an error.
"""

from __future__ import annotations

import logging
import os
import select
from functools import partial
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import HostError, QedError
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.attach import attach, disconnect
from qedfuse.mount.fuse.blocksinvalidator import BlocksInvalidator
from qedfuse.mount.fuse.datarequests import DataRequests
from qedfuse.mount.fuse.fallocate import FallocateLseek
from qedfuse.mount.fuse.fuseinit import MAX_BACKGROUND_REQUESTS_OF_SEVERAL_DISKS, negotiate_init
from qedfuse.mount.fuse.laundering import Laundering
from qedfuse.mount.fuse.operations import Operations
from qedfuse.mount.fuse.partitionfiles import PartitionFiles
from qedfuse.mount.fuse.queuedreads import queued_reads
from qedfuse.mount.fuse.scheduler import scheduled
from qedfuse.mount.fuse.sizefixup import SizeFixup
from qedfuse.mount.fuse.truncation import Truncation
from qedfuse.mount.process.heaptrimmer import HeapTrimmer
from qedfuse.mount.shutdown import Shutdown
from qedfuse.mount.statistics.diagnostics import log_on_signals
from qedfuse.mount.statistics.document import StatisticsSource
from qedfuse.mount.statistics.statisticsserver import serve_statistics
from qedfuse.mount.system.mountpoint import check_not_mounted
from qedfuse.mount.system.mountpointlock import (
    find_new_mount,
    mountpoint_locked,
    refuse_to_cover,
)
from qedfuse.mount.system.mounttable import find_mount, read_mounts
from qedfuse.mount.system.readahead import readahead_bytes, set_readahead
from qedfuse.text import printable
from qedfuse.util.backgroundtasks import background_tasks
from qedfuse.util.garbagecollector import collect_as_usual

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisks
    from qedfuse.mount.fuse.launderer import Launderer
    from qedfuse.mount.options import MountOptions
    from qedfuse.mount.process.announcement import Announcement
    from qedfuse.mount.process.signals import SignalDispatcher
    from qedfuse.mount.process.unmounter import Unmounter
    from qedfuse.mount.sandbox.sandbox import Sandbox
    from qedfuse.mount.system.mounttable import MountEntry

_log = logging.getLogger(__name__)

_MIN_TASKS: Final = 16
"""Number of idle tasks that pyfuse3 keeps.  To start one costs as much as several requests."""
_MAX_TASKS: Final = 2 * MAX_BACKGROUND_REQUESTS_OF_SEVERAL_DISKS
"""Maximum number of tasks of pyfuse3, one for each request.  If a host file does not answer, all
background requests may wait for it; half of the tasks remain for other requests."""


class Server:
    """Serves the disks of one mount."""

    def __init__(
        self,
        disks: ExportedDisks,
        options: MountOptions,
        mountpoint: str,
        launderer: Launderer | None,
        unmounter: Unmounter,
        sandbox: Sandbox | None,
        *,
        metrics: socket.socket | None = None,
        is_directory: bool,
    ) -> None:
        """Build the handlers of requests; nothing is mounted yet.

        Args:
            disks: The disks.
            options: The options of the mount.
            mountpoint: The mountpoint, absolute and free of symbolic links.
            launderer: The process, already forked, that makes the kernel write back and drop cached
                pages; None without one.
            unmounter: Unmounts the mountpoint; a helper process if there is a sandbox.
            sandbox: Entered before the first request; None for no sandbox.
            metrics: The socket at which the metrics are served; None to serve no metrics.
            is_directory: Whether the mountpoint is a directory.
        """
        self._unmounter = unmounter
        self._sandbox = sandbox
        self._disks = disks
        self._options = options
        self._mountpoint = mountpoint
        self._laundering = Laundering(launderer)
        self._size_fixup = SizeFixup(mountpoint, is_directory=is_directory)
        truncation = Truncation(options, self._laundering.try_drop_pages)
        self._partition_files = PartitionFiles(
            *(disks, self._laundering.try_drop_pages, self._share_files)
        )
        self._operations = Operations(
            *(disks, options, truncation, self._size_fixup, self._partition_files),
            is_directory=is_directory,
        )
        self._data_requests: DataRequests | None = None
        self._is_ready = False
        self._serve_metrics: Callable[[StatisticsSource], Awaitable[None]] | None = None
        if metrics is not None:
            # Modules for one option are imported here, because no module may be imported while
            # the mount is served.
            from qedfuse.mount.statistics.metricsserver import serve_metrics  # noqa: PLC0415

            self._serve_metrics = partial(serve_metrics, metrics)
        self._prefetch: Callable[[], Awaitable[None]] | None = None
        if options.prefetch == "all":
            from qedfuse.mount.prefetch import Prefetch  # noqa: PLC0415  late, see above

            self._prefetch = Prefetch(disks.whole_disks, mountpoint).run

    def _share_files(self) -> None:
        """Let the extension in C answer reads of all files that the mount has now.

        Does nothing if pyfuse3 gets all reads (``-d``), or before requests are served.
        """
        if self._data_requests is not None:
            tables = self._data_requests.tables_for_reads()
            extraops.share_files(tables, self._disks.shared_cells())

    async def run(
        self,
        source: str,
        lock_name: bytes | None,
        signals: SignalDispatcher,
        announcement: Announcement,
        protection_failure: str | None,
    ) -> QedError | None:
        """Mount, serve until the mount is gone, and close the connection.

        Args:
            source: The source that the mount table shows.
            lock_name: The name of the mountpoint's lock; None to mount without the lock.
            signals: Passes signals to `Shutdown` while the disks are served.  Later a signal
                stops the compaction of images, which may run when the disks are closed.
            announcement: Announces the mount to other processes.
            protection_failure: Why the process is not protected from memory pressure, for the
                log; None if it is protected.

        Returns:
            None, or an error if data that programs have written is lost or may be lost.  In both
            cases the caller must close the disks, which makes the last changes durable.

        Raises:
            QedError: The disks cannot be mounted, or the mount cannot be announced.  The mount
                is undone unless another mount covers it.
        """
        mountpoint = self._mountpoint
        await self._partition_files.refresh()
        async with mountpoint_locked(lock_name):
            # Another qedfuse may have mounted there while the images were opened.
            check_not_mounted(mountpoint)
            mounts_before = read_mounts()
            connection = attach(self._operations, mountpoint, self._options, source)
        entry = None
        self._laundering.connect(connection)
        try:
            entry = find_new_mount(mountpoint, mounts_before, connection)
            refuse_to_cover(entry)
            with scheduled(self._options.poll_seconds):
                await negotiate_init(
                    *(connection, readahead_bytes(self._options.readahead)),
                    disks=len(self._disks.whole_disks),
                )
                return await self._serve(
                    *(entry, connection, signals, announcement, protection_failure)
                )
        finally:
            extraops.end()
            for disk in self._disks.whole_disks:
                # The caller's last flush must not call `_after_flush`, which would use the closed
                # connection.
                disk.when_flushed(lambda: None)
            self._laundering.stop()
            # Without an entry `_undo_mount` cannot find the mount, so libfuse must unmount.
            pyfuse3.close(unmount=entry is None)
            self._laundering.wait()
            if entry is not None and not self._is_ready:
                # No program relies on a mount that was never announced.
                self._undo_mount(entry)

    async def _serve(
        self,
        entry: MountEntry,
        connection: int,
        signals: SignalDispatcher,
        announcement: Announcement,
        protection_failure: str | None,
    ) -> QedError | None:
        """Announce the mount ``entry``, and answer requests until it is gone; see `run`."""
        options, operations = self._options, self._operations
        announcement.write_record(entry.device)
        readahead_failure = set_readahead(entry.device, options.readahead)
        if readahead_failure is not None and options.readahead is not None:
            # The warning comes before the announcement, because the log of a background process
            # no longer goes to the user's terminal afterwards.
            _log.warning("%s: option readahead: %s", printable(self._mountpoint), readahead_failure)
        statistics_socket = announcement.statistics_socket()
        writeback_cache = operations.enable_writeback_cache
        async with background_tasks() as nursery:
            nursery.start_soon(operations.errors.log_summaries)
            if self._disks.uses_servers:
                nursery.start_soon(
                    _call_at_end, connection, self._mountpoint, self._disks.stop_fetching
                )
            if writeback_cache or options.truncate == "zero":
                nursery.start_soon(self._size_fixup.run, entry.device)
            await self._start_statistics(nursery, statistics_socket)
            heap_trimmer = HeapTrimmer()
            for disk in self._disks.whole_disks:
                invalidator = BlocksInvalidator(partial(self._disks.files_of, disk))
                nursery.start_soon(invalidator.run)
                disk.when_flushed(partial(_after_flush, invalidator, heap_trimmer))
            data_requests = DataRequests(
                operations, extraops.reply_from_file, extraops.defer_read, nursery
            )
            fallocate_lseek = FallocateLseek(
                operations, self._laundering, self._size_fixup, nursery
            )
            extraops_failure = extraops.serve(
                fallocate_lseek,
                fallocate_lseek.may_seek,
                None if operations.debug else data_requests,
                self._disks.shared_cells(),
            )
            self._data_requests = None if operations.debug else data_requests
            if extraops_failure is not None:
                _log.warning(
                    "mounted without fallocate and lseek, so discards free no space: %s",
                    extraops_failure,
                )
            # A shared memory map can make pages dirty even without the write-back cache, so the
            # shutdown must have them written back.  With ``direct_io`` the kernel refuses such a
            # map.
            laundering = None if options.direct_io else self._laundering
            shutdown = Shutdown(
                *(self._disks, laundering, self._mountpoint, entry.device),
                *(self._unmounter, partial(self._disconnect, connection), nursery),
            )
            signals.handle_with(shutdown.receive)
            try:
                # A signal that came before `handle_with` has cancelled this task.  The cancellation
                # must be raised here, before the mount is announced.
                await trio.lowlevel.checkpoint_if_cancelled()
                # The pid file is written before the sandbox is entered.  Otherwise the sandbox
                # would have to permit new files in the pid file's directory, often /run.  A program
                # that sees the pid file still cannot use a disk before the sandbox is entered.
                announcement.write_pidfile()
                # In the sandbox no queue of reads (io_uring) can be made.
                async with queued_reads(data_requests.answer_slowly):
                    if self._sandbox is not None:
                        self._sandbox.enter(announcement.needed_files())
                    announcement.ready()
                    self._unmounter.connect_system_log()
                    self._is_ready = True
                    collect_as_usual()
                    self._log_refusals(readahead_failure, protection_failure)
                    if self._prefetch is not None:
                        nursery.start_soon(self._prefetch)
                    await pyfuse3.main(min_tasks=_MIN_TASKS, max_tasks=_MAX_TASKS)
            finally:
                # No program gets an answer any more, so no read needs to wait for a server.
                self._disks.stop_fetching()
                with trio.CancelScope(shield=True):
                    # Deferred reads must end here: their threads use descriptors that the caller
                    # closes next.
                    await data_requests.drain()
                signals.handle_with(lambda _name: self._disks.stop_compacting())
            announcement.stopping()
            nursery.cancel_scope.cancel()
        return shutdown.failure or self._loss()

    def _disconnect(self, connection: int) -> None:
        """End the connection to the kernel before libfuse's session ends; see `disconnect`."""
        self._laundering.stop()  # the launderer has the connection open as well
        disconnect(connection)

    async def _start_statistics(
        self, nursery: trio.Nursery, statistics_socket: socket.socket | None
    ) -> None:
        """Start the tasks that serve statistics and metrics, and log statistics after signals."""
        source = StatisticsSource(self._disks, self._mountpoint, self._sandbox)
        if statistics_socket is not None:
            nursery.start_soon(serve_statistics, statistics_socket, source)
        if self._serve_metrics is not None:
            nursery.start_soon(self._serve_metrics, source)
        await nursery.start(log_on_signals, source)

    def _loss(self) -> QedError | None:
        """Return an error if any disk has lost data of programs, otherwise None."""
        names = self._disks.with_lost_data
        if not names:
            return None
        msg = (
            f"{printable(self._mountpoint)}: data that programs have written to "
            f"{', '.join(names)} was lost, because the base under it could not be read"
        )
        return HostError(msg)

    def _log_refusals(self, readahead_failure: str | None, protection_failure: str | None) -> None:
        """Log what the sandbox covers, and why the read-ahead or the protection is missing."""
        shown = printable(self._mountpoint)
        if self._sandbox is not None:
            _log.info("%s: sandbox %s", shown, self._sandbox)
        if readahead_failure is not None and self._options.readahead is None:
            # If the user has asked for a read-ahead, `_serve` has logged a warning.
            _log.info("%s: %s", shown, readahead_failure)
        if protection_failure is not None and not self._options.read_only:
            # An ordinary user cannot give the process the privilege that the protection needs.
            level = logging.INFO if os.geteuid() else logging.WARNING
            _log.log(level, "%s: %s", shown, protection_failure)

    def _undo_mount(self, mount: MountEntry) -> None:
        """Unmount the mount, unless it is gone or another mount covers it.

        A failure is not raised, because it would hide the error for which the mount is undone.
        """
        try:
            now = find_mount(mount.path)
            if now is None or now.mount_id != mount.mount_id:
                return
            self._unmounter.unmount(lazy=True)
        except (QedError, OSError) as error:  # OSError: the mount table cannot be read
            _log.warning("%s", error)


def _after_flush(invalidator: BlocksInvalidator, trim_heap: HeapTrimmer) -> None:
    """Trim the heap and check ``st_blocks`` after a flush, unless done shortly before."""
    trim_heap()
    invalidator.flushed()


async def _call_at_end(connection: int, mountpoint: str, action: Callable[[], object]) -> None:
    """Call ``action`` when the kernel ends the connection of the mount at ``mountpoint``.

    The action must end the requests that wait, because `pyfuse3.main` waits for them.  The kernel
    wakes this task's epoll for every request, which costs time, so only a mount with files on
    servers starts this task.

    Raises:
        HostError: The host cannot watch the connection.  The action was not called.
    """
    try:
        with select.epoll() as epoll:
            epoll.register(connection, 0)  # errors only, which are always reported
            await trio.lowlevel.wait_readable(epoll.fileno())
    except OSError as error:
        raise HostError.from_os(error, printable(mountpoint), "cannot mount") from error
    action()
