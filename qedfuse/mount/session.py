"""One mount from its beginning to its end.

What can be refused is refused before anything is mounted, so that there is no mount to undo.  At
the end, the steps have this order:

1. The server stops answering requests, because the mount is gone, or the server has failed.
2. The FUSE connection is closed, so that programs that still wait for a reply get an error.
3. The disks are closed, which flushes them, clears NEED_CHECK and releases the locks.
4. The mount record is removed, or gets the failure of an earlier step.  This step is the last one,
   because a missing record means that all earlier steps have succeeded.

Before the mount is ready, a signal cancels the session.  While the disks are served, a signal
unmounts (`qedfuse.mount.shutdown`).  While the disks are being closed, a signal only ends their
compaction (``compact``), so that the close stays clean.  After that, the process ignores signals.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from qedfuse.disk.lookup.foreignopening import start_maps
from qedfuse.errors import HostError, QedError
from qedfuse.mount.fuse.attributes import file_mode
from qedfuse.mount.helpers import forked_launderer, forked_unmounter
from qedfuse.mount.images.naming import shown_source
from qedfuse.mount.preparation import check_mount, open_disks
from qedfuse.mount.process.announcement import Announcement
from qedfuse.mount.process.memorypressure import protect_from_memory_pressure
from qedfuse.mount.process.openfiles import explained_limit, raise_open_file_limit
from qedfuse.mount.process.signals import SignalDispatcher, ignore_signals
from qedfuse.mount.process.unmounter import DirectUnmounter
from qedfuse.mount.serving import Server
from qedfuse.remote.address import is_url
from qedfuse.text import printable
from qedfuse.util.backgroundtasks import background_tasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisks
    from qedfuse.mount.fuse.launderer import Launderer
    from qedfuse.mount.options import MountOptions
    from qedfuse.mount.process.unmounter import Unmounter
    from qedfuse.mount.sandbox.sandbox import Sandbox
    from qedfuse.mount.system.listenaddress import Listener

_log = logging.getLogger(__name__)


class InterruptedMountError(QedError):
    """A signal arrived before the mount was ready."""

    exit_code = 130


@dataclass(frozen=True, slots=True)
class MountRequest:
    """The arguments of one mount.

    Attributes:
        sources: Images, or directories of images: absolute paths or URLs.
        mountpoint: The mountpoint; absolute and free of symbolic links.
        options: The options.
        pidfile: The absolute path of a file to which the pid of the server is written when the
            mount exists; None to write no such file.
        fake: Whether only to check the arguments, and open and close the disks.
        option_strings: All mount options, each as for ``-o``, with absolute paths.  They are
            stored in the mount record.
        log: Where messages go once the disks can be used; None for stderr.
    """

    sources: tuple[str, ...]
    mountpoint: str
    options: MountOptions
    pidfile: str | None = None
    fake: bool = False
    option_strings: tuple[str, ...] = ()
    log: logging.Handler | None = None


def run_session(request: MountRequest, ready: Callable[[], None]) -> int:
    """Mount, serve until the mount is gone, and close the disks; return the exit code.

    A `QedError` is logged, and its exit code is returned.  Any other exception is raised.  Both are
    also added to the mount record.  After the call the process ignores the signals that end a
    mount.

    The process must not have a second thread.  Such a thread would not be protected from memory
    pressure, and a lock that it holds during a fork would stay locked in the forked helpers.

    Args:
        request: The arguments of the mount.
        ready: Called when the disks can be used.  Not called for a fake mount.
    """
    # This comes first, because threads of trio and the launderer must inherit the protection.
    protection_failure = None if request.fake else protect_from_memory_pressure()
    failure: QedError | None = None
    bug: BaseException | None = None
    # A read-only mount needs no launderer, because the kernel has no dirty pages of the mount.
    is_laundered = not request.fake and not request.options.read_only
    for_sandbox = not request.fake and request.options.sandbox != "off"
    with (
        forked_launderer(is_needed=is_laundered) as launderer,
        forked_unmounter(request.mountpoint, request.log, for_sandbox=for_sandbox) as unmounter,
    ):
        session = _Session(request, ready, protection_failure, launderer, unmounter)
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
            # 70 is the exit code for a bug.
            code = failure.exit_code if failure is not None else 70
            session.finish(None if reason is None else str(reason) or type(reason).__name__, code)
            ignore_signals()
    return 0 if failure is None else failure.exit_code


class _Session:
    """One mount, with the state that is needed after the event loop has ended."""

    def __init__(
        self,
        request: MountRequest,
        ready: Callable[[], None],
        protection_failure: str | None,
        launderer: Launderer | None,
        unmounter: Unmounter | None,
    ) -> None:
        """Prepare a session; nothing is opened yet.

        Args:
            request: The arguments of the mount.
            ready: Called when the disks can be used.
            protection_failure: Why the process is not protected from memory pressure, or None.
            launderer: The helper process that makes the kernel write back pages, or None.
            unmounter: Unmounts, in a process of its own if there is a sandbox; None if that process
                could not be started.
        """
        self._request = request
        self._ready = ready
        self._protection_failure = protection_failure
        self._launderer = launderer
        self._unmounter = unmounter
        self._announcement: Announcement | None = None
        self._is_interrupted = False
        self._failure: QedError | None = None

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Withdraw the announcement of the mount, if there is one; see `Announcement.withdraw`."""
        if self._announcement is not None:
            self._announcement.withdraw(failure, exit_code)

    async def run(self) -> None:
        """Run the session from the checks to the close of the disks.

        Raises:
            InterruptedMountError: A signal arrived before the mount was ready.
            QedError: The mount was refused, or data could not be made durable.
        """
        async with background_tasks() as nursery:
            # After `start` a signal cancels the session, even while an image is being checked.
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
        """Cancel the session, because a signal arrived before the mount was ready."""
        self._is_interrupted = True
        scope.cancel()

    async def _open_and_serve(self, signals: SignalDispatcher, nursery: trio.Nursery) -> None:
        """Open the disks, serve them unless the mount is a fake, and close them in any case.

        `_failure` is set if data may be lost.
        """
        request, options = self._request, self._request.options
        raise_open_file_limit()
        if options.memory_bytes is not None:
            from qedfuse.mount.process.memorylimit import limit_memory  # noqa: PLC0415  rarely needed

            limit_memory(options.memory_bytes)
        mount = check_mount(*(request.sources, request.mountpoint, options), is_fake=request.fake)
        async with AsyncExitStack() as stack:
            with explained_limit(len(mount.sources)):
                disks = await open_disks(
                    *(stack, mount.sources, options), is_directory=mount.is_directory
                )
            if request.fake:
                return
            # Other users can read the mount table, and the query of a URL may be a secret.
            shown = tuple(shown_source(path) if is_url(path) else path for path in request.sources)
            listener = self._listen(stack)
            self._announcement = announcement = Announcement(
                *(request.mountpoint, shown, request.option_strings, request.pidfile),
                self._ready,
            )
            sandbox = self._prepare_sandbox(disks, listener, is_directory=mount.is_directory)
            unmounter = self._unmounter
            server = Server(
                *(disks, options, request.mountpoint, self._launderer),
                *(unmounter or DirectUnmounter(request.mountpoint), sandbox),
                metrics=None if listener is None else listener.socket,
                is_directory=mount.is_directory,
            )
            self._failure = await server.run(
                *(shown[0], mount.lock_name, signals, announcement, self._protection_failure)
            )
            if options.compact == "auto":
                # This limits the time for all disks; each disk limits only its own compaction.
                nursery.start_soon(_stop_compacting_after, disks, options.compact_seconds)
        _log.info("%s: unmounted; the images are closed", printable(request.mountpoint))

    def _listen(self, stack: AsyncExitStack) -> Listener | None:
        """Listen for requests of metrics, if the options demand it, until ``stack`` is closed."""
        if self._request.options.metrics is None:
            return None
        from qedfuse.mount.system.listenaddress import Listener  # noqa: PLC0415  only if needed

        listener = Listener(self._request.options.metrics)
        stack.callback(listener.close)
        return listener

    def _prepare_sandbox(
        self, disks: ExportedDisks, listener: Listener | None, *, is_directory: bool
    ) -> Sandbox | None:
        """Return a sandbox for serving ``disks``, to be entered later; None for no sandbox.

        Raises:
            HostError: The sandbox is ``strict``, and a part of it is not available.
        """
        request, options = self._request, self._request.options
        if options.sandbox == "off":
            return None
        if self._unmounter is None:
            msg = "cannot start the unmounter (a helper process), without which there is no sandbox"
            if options.sandbox == "strict":
                raise HostError(msg)
            _log.warning("%s", msg)
            return None
        # Imported only for a sandbox, and before the mount exists: while it is served, no module
        # may be imported.
        from qedfuse.mount.sandbox.needs import server_needs  # noqa: PLC0415  late, see above
        from qedfuse.mount.sandbox.sandbox import Sandbox  # noqa: PLC0415  late, see above

        # The sandbox forbids to start programs.  So qemu-img, which makes a map of each image in
        # another format, is started now.
        for disk in disks.whole_disks:
            start_maps(disk.chain.layers)
        needs = server_needs(
            *(request.mountpoint, request.sources, options),
            is_directory=is_directory,
            mode=file_mode(options),
            uses_servers=disks.uses_servers,
            socket_directory=None if listener is None else listener.directory,
        )
        return Sandbox(options.sandbox, needs)


async def _stop_compacting_after(disks: ExportedDisks, seconds: float) -> None:
    """End the compaction of all disks after ``seconds``."""
    await trio.sleep(seconds)
    disks.stop_compacting()
