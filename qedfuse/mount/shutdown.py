"""How a mount comes to its end when it is told to: by a signal, politely first.

The first signal unmounts.  While a loop device or a program has a disk open the kernel
refuses that, and taking it away would turn the file system on it into I/O errors; so
everything is made durable at once, and the disk is served until the last close.  The
second signal takes it away all the same.

Once the mount is gone and the disks are being closed, a signal ends what may still take
long, which is compaction, and nothing else: a mount that is being ended twice is ended
in order.  After that the process ignores signals until it exits.

What a signal starts runs in the nursery of the mount.  It is cancelled and has ended before
the connection is closed and the disks are: libfuse does not check whether there still is a
session, and a disk that is being closed must not be flushed by another task.
"""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import HostError, QedError
from qedfuse.mount.system.mountcopies import describe_copies
from qedfuse.mount.system.mounttable import find_mount
from qedfuse.mount.system.unmount import BusyError, sync_mount, unmount
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qedfuse.disk.disk import Disk
    from qedfuse.mount.fuse.operations import Operations

_log = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_RETRY_SECONDS: Final = 1.0
"""Between two tries while busy: a shell that leaves the directory tells us nothing."""
_FORCED_SYNC_SECONDS: Final = 10.0
_FAILURES: Final = (OSError, QedError, RuntimeError)
"""What must not end the mount in place of the shutdown: no descriptor is left for reading the
mount table, for example, or no thread can be started, which is a RuntimeError."""


class InterruptedMountError(QedError):
    """A signal came before the mount was there."""

    exit_code = 130


class Stopper:
    """Waits for signals and brings the mount to its end.

    Attributes:
        interrupted: A signal came before the mount was there.
        failure: Why not everything was made durable at the end of the mount, if it was not.
    """

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self.interrupted = False
        self.failure: QedError | None = None
        self._shutdown: Shutdown | None = None
        self._closing: Sequence[Disk] | None = None

    @contextmanager
    def serving(self, shutdown: Shutdown, disks: Sequence[Disk]) -> Iterator[None]:
        """Pass signals to ``shutdown`` while the body runs, and then to the close of ``disks``."""
        self._shutdown = shutdown
        try:
            yield
        finally:
            self._shutdown = None
            self.failure = shutdown.failure
            self.closing(disks)

    def closing(self, disks: Sequence[Disk]) -> None:
        """Note that the mount is gone, so that from now on a signal hurries its disks' close."""
        self._closing = disks

    async def run(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Act on signals; cancel ``scope`` if there is nothing to unmount yet.

        From then on the process ignores the signals that this no longer acts on.
        """
        heeded = list(SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup(1) wants it
            heeded.remove(signal.SIGHUP)
        early = _replace_handlers(heeded)
        with trio.open_signal_receiver(*heeded) as signals:
            for signum in early:
                signal.raise_signal(signum)
            task_status.started()
            async for signum in signals:
                if self._shutdown is not None:
                    self._shutdown.receive(signal.Signals(signum).name)
                elif self._closing is not None:
                    for disk in self._closing:
                        disk.stop_compacting()
                else:
                    self.interrupted = True
                    scope.cancel()


def _replace_handlers(heeded: list[signal.Signals]) -> list[int]:
    """Replace the handlers of signals by one that only adds the signal to the list returned.

    trio restores the handlers that it has found, and raises again what it has not delivered.
    The default action would kill a process that has closed everything and only has to exit.
    """
    received: list[int] = []
    for signum in heeded:
        signal.signal(signum, lambda number, _frame: received.append(number))
    return received


def ignore_signals() -> None:
    """Ignore `SIGNALS` until the process exits; the interpreter leaves that as it is."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class Shutdown:
    """Unmounts one mount when signals come.

    Attributes:
        failure: Why not everything was made durable, if the mount was ended before it was.
    """

    def __init__(
        self, operations: Operations, mountpoint: str, device: str, nursery: trio.Nursery
    ) -> None:
        """Unmount ``mountpoint`` while it shows ``device``, by tasks in ``nursery``."""
        self.failure: QedError | None = None
        self._operations = operations
        self._mountpoint = mountpoint
        self._device = device
        self._nursery = nursery
        self._signals = 0
        self._idle = trio.Event()
        operations.released = self._wake

    def receive(self, name: str) -> None:
        """Act on a signal: the first unmounts, the second does so by force."""
        self._signals += 1
        if self._signals == 1:
            self._nursery.start_soon(self._unmount_when_idle, name)
        elif self._signals == 2:  # noqa: PLR2004
            self._nursery.start_soon(self._force)

    def _wake(self) -> None:
        """Try again: the last handle has been closed."""
        self._idle.set()

    def _is_ours(self) -> bool:
        """Tell whether the mountpoint still shows our mount, not what lies beneath it."""
        entry = find_mount(self._mountpoint)
        return entry is not None and entry.device == self._device

    async def _unmount_when_idle(self, why: str) -> None:
        """Unmount as soon as nobody uses the mount; the end of it ends `pyfuse3.main`."""
        told = False
        while True:
            self._idle = trio.Event()
            try:
                if self._is_ours():
                    # In a thread: the kernel sends us its dirty pages before it agrees.
                    await trio.to_thread.run_sync(unmount, self._mountpoint, abandon_on_cancel=True)
                    break
                if not self._operations.opened:  # somebody has detached it already
                    pyfuse3.terminate()
                    return
            except BusyError:
                if not told:
                    durable = await self._flush()
                    _log.warning(
                        "%s: %s: still in use: %s; it goes on until the "
                        "last close; a second signal ends it by force",
                        printable(self._mountpoint),
                        why,
                        "everything is durable now" if durable else "not everything is durable",
                    )
            except _FAILURES as error:
                if not told:
                    _log.warning("%s: %s", why, error)
            told = True
            with trio.move_on_after(_RETRY_SECONDS):
                await self._idle.wait()
        await self._tell_of_copies(why)

    async def _tell_of_copies(self, why: str) -> None:
        """Log why the mount goes on after it has been unmounted, unless it ends soon."""
        shown = printable(self._mountpoint)
        await trio.sleep(_RETRY_SECONDS)
        try:
            copies = await trio.to_thread.run_sync(
                describe_copies, self._device, abandon_on_cancel=True
            )
        except _FAILURES as error:
            _log.warning("%s: %s: cannot find its other mounts: %s", shown, why, error)
            return
        if copies is not None:
            _log.warning(
                "%s: %s: unmounted here, but %s; it goes on until that is unmounted; a second "
                "signal ends it by force",
                *(shown, why, copies),
            )

    async def _flush(self) -> bool:
        """Bring in what the kernel holds back, and make everything durable.

        What fails for one disk is logged, and the others are made durable all the same.

        Returns:
            Whether nothing failed.
        """
        durable = True

        @contextmanager
        def failing() -> Iterator[None]:
            nonlocal durable
            try:
                yield
            except _FAILURES as error:
                durable = False
                shown = printable(self._mountpoint)
                _log.error("%s: cannot make everything durable: %s", shown, error)

        with failing():
            if self._is_ours():
                await trio.to_thread.run_sync(sync_mount, self._mountpoint, abandon_on_cancel=True)
        for view in self._operations.views.values():
            with failing():
                if self._operations.write_back is not None and view.writers:
                    # What the kernel was told above it does, but it need not wait for it.
                    await self._operations.write_back(view)
            with failing():
                await view.disk.flush()
        return durable

    async def _force(self) -> None:
        """Take the mount away from whoever uses it."""
        if self._operations.opened:
            _log.warning(
                "%s: second signal: ended while in use: whoever has it open, such as a loop "
                "device, gets I/O errors from now on",
                printable(self._mountpoint),
            )
        durable = False
        with trio.move_on_after(_FORCED_SYNC_SECONDS):
            durable = await self._flush()
        if not durable:
            msg = f"{printable(self._mountpoint)}: ended by force before everything was durable"
            self.failure = HostError(msg)
            _log.error("%s: what the kernel has not sent yet is lost", msg)
        try:
            if self._is_ours():
                await trio.to_thread.run_sync(
                    lambda: unmount(self._mountpoint, lazy=True), abandon_on_cancel=True
                )
        except _FAILURES as error:
            _log.warning("%s", error)
        pyfuse3.terminate()
