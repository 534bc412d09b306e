"""How a mount comes to its end when it is told to: by a signal, politely first.

The first signal unmounts.  While a loop device or a program has a disk open the kernel
refuses that, and taking it away would turn the file system on it into I/O errors; so
everything is made durable at once, and the disk is served until the last close.  The
second signal takes it away all the same.

Once the mount is gone and the disks are being closed, a signal ends what may still take
long, which is compaction, and nothing else: a mount that is being ended twice is ended
in order.
"""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import QedError
from qedfuse.mount.copies import describe_copies
from qedfuse.mount.mounttable import find_mount
from qedfuse.mount.unmount import BusyError, sync_mount, unmount
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qedfuse.disk.disk import Disk
    from qedfuse.mount.operations import Operations

_log = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_RETRY_SECONDS: Final = 1.0
"""Between two tries while busy: a shell that leaves the directory tells us nothing."""
_FORCED_SYNC_SECONDS: Final = 10.0


class InterruptedMountError(QedError):
    """A signal came before the mount was there."""

    exit_code = 130


class Stopper:
    """Waits for signals and brings the mount to its end.

    Attributes:
        interrupted: A signal came before the mount was there.
    """

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self.interrupted = False
        self._mount: tuple[Operations, str, str] | None = None
        self._idle = trio.Event()
        self._closing: Sequence[Disk] | None = None

    def closing(self, disks: Sequence[Disk]) -> None:
        """Note that the mount is gone, so that from now on a signal hurries its disks' close."""
        self._closing = disks

    def mounted(self, operations: Operations, mountpoint: str, device: str) -> None:
        """Note that the mount is there, so that from now on a signal unmounts it."""
        self._mount = (operations, mountpoint, device)
        operations.released = self._wake

    def _wake(self) -> None:
        """Try again: the last handle has been closed."""
        self._idle.set()

    async def run(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Act on signals; cancel ``scope`` if there is nothing to unmount yet."""
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            async with trio.open_nursery() as nursery:
                number = 0
                async for signum in signals:
                    number += 1
                    if self._closing is not None:
                        for disk in self._closing:
                            disk.stop_compacting()
                    elif self._mount is None:
                        self.interrupted = True
                        scope.cancel()
                    elif number == 1:
                        nursery.start_soon(self._unmount_when_idle, signal.Signals(signum).name)
                    elif number == 2:  # noqa: PLR2004
                        nursery.start_soon(self._force)

    def _is_ours(self) -> bool:
        """Tell whether the mountpoint still shows our mount, not what lies beneath it."""
        assert self._mount is not None  # noqa: S101
        entry = find_mount(self._mount[1])
        return entry is not None and entry.device == self._mount[2]

    async def _unmount_when_idle(self, why: str) -> None:
        """Unmount as soon as nobody uses the mount; the end of it ends `pyfuse3.main`."""
        assert self._mount is not None  # noqa: S101
        operations, mountpoint, _device = self._mount
        told = False
        while True:
            self._idle = trio.Event()
            try:
                if self._is_ours():
                    # In a thread: the kernel sends us its dirty pages before it agrees.
                    await trio.to_thread.run_sync(unmount, mountpoint, abandon_on_cancel=True)
                    await self._tell_of_copies(why)
                    return
                if not operations.opened:  # somebody has detached it already
                    pyfuse3.terminate()
                    return
            except BusyError:
                if not told:
                    durable = await self._flush()
                    _log.warning(
                        "%s: %s: still in use: %s; it goes on until the "
                        "last close; a second signal ends it by force",
                        printable(mountpoint),
                        why,
                        "everything is durable now" if durable else "not everything is durable",
                    )
            except QedError as error:
                if not told:
                    _log.warning("%s: %s", why, error)
            told = True
            with trio.move_on_after(_RETRY_SECONDS):
                await self._idle.wait()

    async def _tell_of_copies(self, why: str) -> None:
        """Log why the mount goes on after it has been unmounted, unless it ends soon."""
        assert self._mount is not None  # noqa: S101
        _operations, mountpoint, device = self._mount
        await trio.sleep(_RETRY_SECONDS)
        copies = await trio.to_thread.run_sync(describe_copies, device, abandon_on_cancel=True)
        if copies is not None:
            _log.warning(
                "%s: %s: unmounted here, but %s; it goes on until that is unmounted; a second "
                "signal ends it by force",
                *(printable(mountpoint), why, copies),
            )

    async def _flush(self) -> bool:
        """Bring in what the kernel holds back, and make everything durable.

        What fails for one disk is logged, and the others are made durable all the same.

        Returns:
            Whether nothing failed.
        """
        assert self._mount is not None  # noqa: S101
        operations, mountpoint, _device = self._mount
        durable = True

        @contextmanager
        def failing() -> Iterator[None]:
            nonlocal durable
            try:
                yield
            except (OSError, QedError) as error:
                durable = False
                _log.error("%s: cannot make everything durable: %s", printable(mountpoint), error)

        with failing():
            if self._is_ours():
                await trio.to_thread.run_sync(sync_mount, mountpoint, abandon_on_cancel=True)
        for view in operations.views.values():
            with failing():
                if operations.write_back is not None and view.writers:
                    # What the kernel was told above it does, but it need not wait for it.
                    await operations.write_back(view)
            with failing():
                await view.disk.flush()
        return durable

    async def _force(self) -> None:
        """Take the mount away from whoever uses it."""
        assert self._mount is not None  # noqa: S101
        operations, mountpoint, _device = self._mount
        if operations.opened:
            _log.warning(
                "%s: second signal: ended while in use: whoever has it open, such as a loop "
                "device, gets I/O errors from now on",
                printable(mountpoint),
            )
        with trio.move_on_after(_FORCED_SYNC_SECONDS):
            await self._flush()
        try:
            if self._is_ours():
                await trio.to_thread.run_sync(
                    lambda: unmount(mountpoint, lazy=True), abandon_on_cancel=True
                )
        except QedError as error:
            _log.warning("%s", error)
        pyfuse3.terminate()
