"""One mount from its beginning to its end.

The order of the beginning: everything that can be refused is refused before the kernel
hears of us, so that a failure leaves no trace.  The order of the end is the reverse, for
reasons: first the kernel stops sending requests (the mount is gone, or was taken away);
then the connection is closed, so that whoever still waits gets an error and not silence;
only then are the disks closed, which flushes them, clears NEED_CHECK and releases the
locks; and the note for ``qedfuse umount`` goes last, because its absence says that all
the rest went well.

After a failure inside, the mountpoint is left dead (ENOTCONN) on purpose.  Unmounting
would show the empty directory beneath, and a backup job would believe it.
"""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import QedError, UsageError
from qedfuse.mount.fuse import extraops
from qedfuse.mount.fuse.attach import attach
from qedfuse.mount.fuse.exporteddisk import ExportedDisk
from qedfuse.mount.fuse.fallocate import SpaceRequests
from qedfuse.mount.fuse.fuseinit import shake_hands
from qedfuse.mount.fuse.launderer import Launderer
from qedfuse.mount.fuse.laundering import Laundering
from qedfuse.mount.fuse.operations import Operations
from qedfuse.mount.fuse.scheduler import scheduled
from qedfuse.mount.fuse.sizefixup import SizeFixup
from qedfuse.mount.images.naming import Source, find_sources
from qedfuse.mount.images.overlays import open_source
from qedfuse.mount.images.roles import find_read_only
from qedfuse.mount.process.heaptrimmer import HeapTrimmer
from qedfuse.mount.process.memorypressure import protect_from_memory_pressure
from qedfuse.mount.process.notify import PidFile, ServiceManager
from qedfuse.mount.process.openfiles import explained_limit, raise_open_file_limit
from qedfuse.mount.shutdown import InterruptedMountError, Shutdown, Stopper, ignore_signals
from qedfuse.mount.system.mountpoint import check_mountpoint, check_not_mounted, is_below
from qedfuse.mount.system.mountpointlock import (
    find_new_mount,
    mountpoint_lock_name,
    mountpoint_locked,
    refuse_to_cover,
)
from qedfuse.mount.system.mountrecord import MountRecord, MountRecordFile, process_start
from qedfuse.mount.system.mounttable import find_mount, read_mounts
from qedfuse.mount.system.privileges import check_privileges
from qedfuse.mount.system.readahead import readahead_bytes, set_readahead
from qedfuse.mount.system.unmount import unmount
from qedfuse.text import printable
from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from qedfuse.disk.disk import Disk
    from qedfuse.mount.options import MountOptions
    from qedfuse.mount.system.mounttable import MountEntry

_log = logging.getLogger(__name__)

_TASKS: Final = 16
"""Tasks that wait for requests and are kept: making one costs as much as several requests."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What is to be mounted, where and how.

    Attributes:
        sources: Images, or directories of images; absolute.
        mountpoint: Where; absolute and free of links.
        options: How.
        pidfile: File that says who serves the mount, once it is ready; absolute.
        fake: Do everything but mount.
        option_strings: All mount options, each as for ``-o``, with absolute paths.  A remount
            compares its options with these.
    """

    sources: tuple[str, ...]
    mountpoint: str
    options: MountOptions
    pidfile: str | None = None
    fake: bool = False
    option_strings: tuple[str, ...] = ()


def run_session(request: MountRequest, ready: Callable[[], None]) -> int:
    """Mount, call ``ready`` when the disks can be used, serve until the end; give an exit code."""
    # Before trio starts threads: they inherit it, and so does the helper process.
    unprotected = None if request.fake else protect_from_memory_pressure()
    failure: QedError | None = None
    crash: BaseException | None = None
    with _forked_launderer(request) as launderer:
        session = _Session(request, ready, unprotected, launderer)
        try:
            trio.run(session.run)
        except QedError as error:
            failure = error
            _log.error("%s", error)
        except BaseException as error:
            crash = error
            raise
        finally:
            told = failure or crash
            code = failure.exit_code if failure is not None else 70
            session.finish(None if told is None else str(told) or type(told).__name__, code)
            ignore_signals()
    return 0 if failure is None else failure.exit_code


def _forked_launderer(request: MountRequest) -> AbstractContextManager[Launderer | None]:
    """Start the helper process of a mount for which the kernel may keep data back."""
    if request.fake or request.options.read_only:
        return nullcontext()
    try:
        return Launderer()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        _log.warning("no helper process: holes in disks in use are told as data: %s", reason)
        return nullcontext()


class _Session:
    """The parts of one mount that must be taken down again."""

    def __init__(
        self,
        request: MountRequest,
        ready: Callable[[], None],
        unprotected: str | None,
        launderer: Launderer | None,
    ) -> None:
        self._request = request
        self._ready = ready
        self._unprotected = unprotected
        self._launderer = launderer
        # What others look at.  Its paths are resolved before there is a mount: after that
        # they may lead through it, and this process would wait for its own answer.
        self._manager: ServiceManager | None = None
        self._pidfile: PidFile | None = None
        self._note: MountRecordFile | None = None
        self._stopper = Stopper()
        self._is_ready = False

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Take back what others look at: the pid file and the note."""
        if self._manager is not None:
            self._manager.close()
        if self._pidfile is not None:
            self._pidfile.remove()
            self._pidfile.close()
        if self._note is not None:
            self._note.finish(failure, exit_code)

    async def run(self) -> None:
        """Live through the whole session.

        Raises:
            QedError: It cannot begin, or something written could not be made durable.
        """
        async with open_scope() as nursery:
            # From here on a signal ends things in order, also a check that takes long.
            await nursery.start(self._stopper.run, nursery.cancel_scope)
            await self._open_and_serve(nursery)
            nursery.cancel_scope.cancel()
        if self._stopper.interrupted:
            msg = f"{printable(self._request.mountpoint)}: not mounted: interrupted"
            raise InterruptedMountError(msg)
        if self._stopper.failure is not None:
            raise self._stopper.failure

    async def _open_and_serve(self, nursery: trio.Nursery) -> None:
        """Open the disks, serve them, and close them whatever happens."""
        request, options = self._request, self._request.options
        raise_open_file_limit()
        sources = find_sources(request.sources)
        if options.overlay is not None and len(sources) != 1:
            msg = f"option overlay: found {len(sources)} images, expected one"
            raise UsageError(msg)
        claim = mountpoint_lock_name(request.mountpoint)
        directory = check_mountpoint(request.mountpoint, len(sources))
        if not request.fake:
            check_privileges(for_others=options.allow_other or options.allow_root)
        async with AsyncExitStack() as disks:
            with explained_limit(len(sources)):
                views = await self._open(disks, sources, directory=directory)
            if request.fake:
                return
            self._find_watchers()
            opened = [view.disk for view in views]
            await self._attach_and_serve(views, claim, directory=directory)
            if options.compact == "auto":
                # Each keeps to the time by itself; they are closed one after the other.
                nursery.start_soon(_stop_compacting, opened, options.compact_seconds)
        _log.info("%s: unmounted; the images are closed", printable(request.mountpoint))

    async def _open(
        self, disks: AsyncExitStack, sources: list[Source], *, directory: bool
    ) -> list[ExportedDisk]:
        """Open one disk for each source; the stack closes them."""
        options = self._request.options
        views = []
        first = pyfuse3.ROOT_INODE + 1 if directory else pyfuse3.ROOT_INODE
        read_only = find_read_only(sources, options)
        for inode, source in enumerate(sources, first):
            wanted = options.for_read_only_disk() if source in read_only else options
            disk = await disks.enter_async_context(open_source(source.path, wanted))
            views.append(ExportedDisk(disk, source.name, inode, read_only=source in read_only))
        return views

    def _find_watchers(self) -> None:
        """Find the places where others learn of the mount, before there is one.

        Raises:
            HostError: The pid file has no directory.
        """
        request = self._request
        self._manager = ServiceManager()
        try:
            self._note = MountRecordFile()
        except QedError as error:
            _log.warning("%s: qedfuse umount will not find this mount's process", error)
        if request.pidfile is not None:
            self._pidfile = PidFile(request.pidfile)
            if is_below(self._pidfile.path, request.mountpoint):
                _log.warning(
                    "the pid file %s lies under the mountpoint, which hides it",
                    printable(self._pidfile.path),
                )

    async def _attach_and_serve(
        self, views: list[ExportedDisk], claim: bytes | None, *, directory: bool
    ) -> None:
        """Mount, serve until the mount is gone, and close the connection."""
        request = self._request
        mountpoint = request.mountpoint

        async def forget_pages(view: ExportedDisk) -> bool:
            return await laundering.forget_soon(view)

        operations = Operations(views, request.options, forget_pages, directory=directory)
        async with mountpoint_locked(claim):
            # Another qedfuse may have mounted while the images were opened.
            check_not_mounted(mountpoint)
            before = read_mounts()
            connection = attach(operations, mountpoint, request.options, request.sources[0])
        entry = None
        laundering = Laundering(connection, self._launderer)
        try:
            entry = find_new_mount(mountpoint, before, connection)
            refuse_to_cover(entry)
            with scheduled(request.options.poll_seconds):
                await shake_hands(connection, readahead_bytes(request.options.readahead))
                await self._serve(operations, laundering, entry)
        finally:
            extraops.end()
            for view in views:
                view.disk.when_flushed(lambda: None)
            laundering.stop()
            # Without an entry libfuse has to take the mount away, which `_take_back` cannot.
            pyfuse3.close(unmount=entry is None)
            laundering.wait()
            if entry is not None and not self._is_ready:
                # Nobody has seen the mount yet, so nothing is lost by taking it away.
                _take_back(entry)

    async def _serve(
        self, operations: Operations, laundering: Laundering, entry: MountEntry
    ) -> None:
        """Say that the mount is ready and answer requests until it is gone."""
        mountpoint = self._request.mountpoint
        self._leave_note(entry.device)
        untuned = set_readahead(entry.device, self._request.options.readahead)
        if untuned is not None and self._request.options.readahead is not None:
            # Whoever asked for it is still there to be told.
            _log.warning("%s: option readahead: %s", printable(mountpoint), untuned)
        keeper = SizeFixup(mountpoint, entry.device)
        async with open_scope() as nursery:
            nursery.start_soon(operations.errors.run)
            if operations.enable_writeback_cache:
                operations.write_back = laundering.launder_all
            if operations.enable_writeback_cache or self._request.options.truncate == "zero":
                operations.size_lost = keeper.lost
                nursery.start_soon(keeper.run)
            trim = HeapTrimmer()
            for view in operations.views.values():
                view.disk.when_flushed(partial(_after_flush, view, trim))
            missing = extraops.serve(SpaceRequests(operations, nursery, laundering))
            if missing is not None:
                _log.warning("without fallocate and lseek: discards free nothing: %s", missing)
            shutdown = Shutdown(operations, mountpoint, entry.device, nursery)
            disks = [view.disk for view in operations.views.values()]
            with self._stopper.serving(shutdown, disks):
                # A signal that came before `serving` has cancelled this task by now.
                await trio.lowlevel.checkpoint_if_cancelled()
                self._tell_ready()
                if untuned is not None and self._request.options.readahead is None:
                    # For the log: an ordinary user need not hear this at every mount.
                    _log.info("%s: %s", printable(mountpoint), untuned)
                if self._unprotected is not None and not self._request.options.read_only:
                    # Root can do something about it.
                    level = logging.INFO if os.geteuid() else logging.WARNING
                    _log.log(level, "%s: %s", printable(mountpoint), self._unprotected)
                await pyfuse3.main(min_tasks=_TASKS)
            self._notify("STOPPING=1")
            nursery.cancel_scope.cancel()

    def _leave_note(self, device: str) -> None:
        """Make the process findable; a mount that is not findable still works."""
        if self._note is None:
            return
        pid = os.getpid()
        request = self._request
        note = MountRecord(
            *(pid, process_start(pid) or 0, request.mountpoint, request.sources),
            options=request.option_strings,
        )
        try:
            self._note.write(device, note)
        except QedError as error:
            _log.warning("%s: qedfuse umount will not find this mount's process", error)

    def _tell_ready(self) -> None:
        """Tell everybody who waits for it.

        Raises:
            HostError: The pid file cannot be written.
            QedError: Nobody waits for it any more.
        """
        if self._pidfile is not None:
            self._pidfile.write()
        self._ready()
        self._is_ready = True
        self._notify("READY=1")

    def _notify(self, state: str) -> None:
        """Tell the service manager."""
        if self._manager is not None:
            self._manager.notify(state)


async def _stop_compacting(disks: Sequence[Disk], seconds: float) -> None:
    """End the compaction of all disks after some seconds."""
    await trio.sleep(seconds)
    for disk in disks:
        disk.stop_compacting()


def _after_flush(view: ExportedDisk, trim: HeapTrimmer) -> None:
    """Do what can wait until a flush has ended."""
    trim()
    _tell_of_space(view)


def _tell_of_space(view: ExportedDisk) -> None:
    """Have the kernel ask again if a disk takes up more or less of the host than it knows."""
    if view.blocks >= 0 and view.disk.fstat().st_blocks != view.blocks:
        view.blocks = -1
        with suppress(OSError):  # it may not know the disk at all
            pyfuse3.invalidate_inode(view.inode, attr_only=True)


def _take_back(mount: MountEntry) -> None:
    """Remove a mount that never became ready, unless another one covers it by now."""
    now = find_mount(mount.path)
    if now is None or now.mount_id != mount.mount_id:
        return
    try:
        unmount(mount.path, lazy=True)
    except QedError as error:
        _log.warning("%s", error)
