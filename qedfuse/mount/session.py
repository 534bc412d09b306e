"""One mount from its beginning to its end.

At the beginning, everything that can be refused is refused before the kernel is involved, so
that a failure leaves no trace.  The end has the reverse order, for these reasons.  First the
kernel stops sending requests: the mount is gone, or was detached.  Then the connection is
closed, so that programs that still wait get an error instead of waiting forever.  Only then are
the disks closed, which flushes them, clears NEED_CHECK and releases the locks.  The mount record
is removed last, because its absence means that all the rest has succeeded.

Signals have a meaning in each phase.  Before the mount is ready, a signal cancels the session.
While the disks are served, it unmounts (`qedfuse.mount.shutdown`).  While the disks are being
closed, it ends the compaction, which may take long, and nothing else: so a second signal does
not make a clean end an unclean one.  After that the process ignores signals until it exits.
"""

from __future__ import annotations

import logging
import os
from contextlib import AsyncExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyfuse3
import trio

from qedfuse.errors import QedError, UsageError
from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
from qedfuse.mount.fuse.launderer import Launderer
from qedfuse.mount.images.naming import Source, find_sources
from qedfuse.mount.images.overlays import open_source
from qedfuse.mount.images.roles import find_read_only
from qedfuse.mount.process.announcement import Announcement
from qedfuse.mount.process.memorypressure import protect_from_memory_pressure
from qedfuse.mount.process.openfiles import explained_limit, raise_open_file_limit
from qedfuse.mount.process.signals import SignalDispatcher, ignore_signals
from qedfuse.mount.serving import Server
from qedfuse.mount.system.mountpoint import check_mountpoint
from qedfuse.mount.system.mountpointlock import mountpoint_lock_name
from qedfuse.mount.system.privileges import check_privileges
from qedfuse.text import printable
from qedfuse.util.backgroundtasks import background_tasks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


class InterruptedMountError(QedError):
    """A signal arrived before the mount was ready."""

    exit_code = 130


@dataclass(frozen=True, slots=True)
class MountRequest:
    """The arguments of one mount.

    Attributes:
        sources: Images, or directories of images; absolute paths.
        mountpoint: The mountpoint; absolute and free of symbolic links.
        options: The options.
        pidfile: The absolute path of a file that gets the pid of the server once the disks can
            be used; None for none.
        fake: Do everything except mount.
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
    """Mount and serve until the mount is gone; return the exit code.

    Args:
        request: The arguments of the mount.
        ready: Called when the disks can be used.
    """
    # Before trio starts threads: they inherit the flag, and so does the helper process.
    unprotected = None if request.fake else protect_from_memory_pressure()
    failure: QedError | None = None
    bug: BaseException | None = None
    with _forked_launderer(request) as launderer:
        session = _Session(request, ready, unprotected, launderer)
        try:
            trio.run(session.run)
        except QedError as error:
            failure = error
            _log.error("%s", error)
        except BaseException as error:
            bug = error
            raise
        finally:
            reason = failure or bug
            code = failure.exit_code if failure is not None else 70
            session.finish(None if reason is None else str(reason) or type(reason).__name__, code)
            ignore_signals()
    return 0 if failure is None else failure.exit_code


def _forked_launderer(request: MountRequest) -> AbstractContextManager[Launderer | None]:
    """Return the helper process; None if the kernel caches no writes, or if it cannot start."""
    if request.fake or request.options.read_only:
        return nullcontext()
    try:
        return Launderer()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        _log.warning("no helper process: holes in disks in use are reported as data: %s", reason)
        return nullcontext()


class _Session:
    """The state of one mount that outlives the event loop."""

    def __init__(
        self,
        request: MountRequest,
        ready: Callable[[], None],
        unprotected: str | None,
        launderer: Launderer | None,
    ) -> None:
        """Prepare a session; the arguments are explained in `run_session` and `Server.run`."""
        self._request = request
        self._ready = ready
        self._unprotected = unprotected
        self._launderer = launderer
        self._announcement: Announcement | None = None
        self._is_interrupted = False
        self._failure: QedError | None = None

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Withdraw the announcement of the mount, or record why it failed."""
        if self._announcement is not None:
            self._announcement.withdraw(failure, exit_code)

    async def run(self) -> None:
        """Run the session from the checks to the close of the disks.

        Raises:
            QedError: The mount was refused, or data could not be made durable.
        """
        async with background_tasks() as nursery:
            # From here on a signal ends the session in order, also a check that takes long.
            signals = SignalDispatcher(partial(self._interrupt, nursery.cancel_scope))
            await nursery.start(signals.run)
            await self._open_and_serve(signals, nursery)
            nursery.cancel_scope.cancel()
        if self._is_interrupted:
            msg = f"{printable(self._request.mountpoint)}: not mounted: interrupted"
            raise InterruptedMountError(msg)
        if self._failure is not None:
            raise self._failure

    def _interrupt(self, scope: trio.CancelScope, _signal_name: str) -> None:
        """Act on a signal before the mount is ready: cancel the session."""
        self._is_interrupted = True
        scope.cancel()

    async def _open_and_serve(self, signals: SignalDispatcher, nursery: trio.Nursery) -> None:
        """Open the disks, serve them, and close them in any case."""
        request, options = self._request, self._request.options
        raise_open_file_limit()
        sources = find_sources(request.sources)
        if options.overlay is not None and len(sources) != 1:
            msg = f"option overlay: found {len(sources)} images, expected one"
            raise UsageError(msg)
        lock_name = mountpoint_lock_name(request.mountpoint)
        directory = check_mountpoint(request.mountpoint, len(sources))
        if not request.fake:
            check_privileges(for_others=options.allow_other or options.allow_root)
        async with AsyncExitStack() as stack:
            with explained_limit(len(sources)):
                disks = await self._open(stack, sources, directory=directory)
            if request.fake:
                return
            self._announcement = announcement = Announcement(
                *(request.mountpoint, request.sources, request.option_strings, request.pidfile),
                self._ready,
            )
            server = Server(
                *(disks, options, request.mountpoint, self._launderer), directory=directory
            )
            self._failure = await server.run(
                *(request.sources[0], lock_name, signals, announcement, self._unprotected)
            )
            if options.compact == "auto":
                # The limit is for all disks together, which are closed one after the other;
                # the limit of each is its own.
                nursery.start_soon(_stop_compacting_after, disks, options.compact_seconds)
        _log.info("%s: unmounted; the images are closed", printable(request.mountpoint))

    async def _open(
        self, stack: AsyncExitStack, sources: list[Source], *, directory: bool
    ) -> ExportedDisks:
        """Open one disk for each source; the stack closes them."""
        options = self._request.options
        found = []
        first_inode = pyfuse3.ROOT_INODE + 1 if directory else pyfuse3.ROOT_INODE
        read_only = find_read_only(sources, options)
        for inode, source in enumerate(sources, first_inode):
            opening = options.for_read_only_disk() if source in read_only else options
            disk = await stack.enter_async_context(open_source(source.path, opening))
            found.append(ExportedDisk(disk, source.name, inode, read_only=source in read_only))
        return ExportedDisks(found)


async def _stop_compacting_after(disks: ExportedDisks, seconds: float) -> None:
    """End the compaction of all disks after some seconds."""
    await trio.sleep(seconds)
    disks.stop_compacting()
