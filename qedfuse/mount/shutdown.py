"""Unmounting when signals arrive: the first waits until the mount is idle, the second forces it.

At the first signal the mount is unmounted.  While a loop device or a program has a disk open,
the kernel refuses that, and a forced unmount would turn the file system on the disk into I/O
errors.  So all disks are made durable right away, and they are served until the last close.
The second signal unmounts all the same.

The tasks that signals start run in the nursery of the mount.  They are cancelled and have ended
before the connection and the disks are closed: libfuse does not check whether a session still
exists, and a disk that is being closed must not be flushed by another task.
"""

from __future__ import annotations

import logging
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
    from collections.abc import Iterator

    from qedfuse.mount.fuse.exporteddisk import ExportedDisks
    from qedfuse.mount.fuse.laundering import Laundering

_log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0
"""Time between two attempts while the mount is in use: the kernel does not report that a
process has left a working directory."""
_FORCED_SYNC_SECONDS: Final = 10.0
"""Longest time for making disks durable before a forced unmount."""
_FAILURES: Final = (OSError, QedError, RuntimeError)
"""Exceptions that must not end the mount without an unmount: for example, no descriptor is left
for reading the mount table, or no thread can be started (RuntimeError)."""


class Shutdown:
    """Unmounts one mount when signals arrive.

    Attributes:
        failure: Why not all data was made durable before a forced unmount; None if it was.
    """

    def __init__(
        self,
        disks: ExportedDisks,
        laundering: Laundering | None,
        mountpoint: str,
        device: str,
        nursery: trio.Nursery,
    ) -> None:
        """Unmount ``mountpoint`` as long as it shows the file system ``device``.

        Args:
            disks: The disks of the mount.
            laundering: Makes the kernel write back its dirty pages; None if it has none.
            mountpoint: The mountpoint.
            device: The device number of the mount, ``MAJOR:MINOR``.
            nursery: For the tasks that signals start.
        """
        self.failure: QedError | None = None
        self._disks = disks
        self._laundering = laundering
        self._mountpoint = mountpoint
        self._device = device
        self._nursery = nursery
        self._signals = 0

    def receive(self, name: str) -> None:
        """Act on a signal: the first unmounts when idle, the second by force."""
        self._signals += 1
        if self._signals == 1:
            self._nursery.start_soon(self._unmount_when_idle, name)
        elif self._signals == 2:  # noqa: PLR2004
            self._nursery.start_soon(self._force)

    def _is_mounted(self) -> bool:
        """Return whether the mountpoint shows this mount, and not what lies beneath it."""
        entry = find_mount(self._mountpoint)
        return entry is not None and entry.device == self._device

    async def _unmount_when_idle(self, signal_name: str) -> None:
        """Unmount as soon as the mount is not in use; that ends `pyfuse3.main`."""
        reported = False
        while True:
            last_close = self._disks.next_last_close()
            try:
                if self._is_mounted():
                    # In a thread: before it unmounts, the kernel sends its dirty pages here.
                    await trio.to_thread.run_sync(unmount, self._mountpoint, abandon_on_cancel=True)
                    break
                if not self._disks.open_handles:  # it has been detached by a lazy unmount
                    pyfuse3.terminate()
                    return
            except BusyError:
                if not reported:
                    durable = await self._flush()
                    _log.warning(
                        "%s: %s: still in use: %s; it goes on until the "
                        "last close; a second signal ends it by force",
                        printable(self._mountpoint),
                        signal_name,
                        "everything is durable now" if durable else "not everything is durable",
                    )
            except _FAILURES as error:
                if not reported:
                    _log.warning("%s: %s", signal_name, error)
            reported = True
            with trio.move_on_after(_RETRY_SECONDS):
                await last_close.wait()
        await self._report_copies(signal_name)

    async def _report_copies(self, signal_name: str) -> None:
        """Log why the mount goes on after it has been unmounted, unless it ends soon."""
        shown = printable(self._mountpoint)
        await trio.sleep(_RETRY_SECONDS)
        try:
            copies = await trio.to_thread.run_sync(
                describe_copies, self._device, abandon_on_cancel=True
            )
        except _FAILURES as error:
            _log.warning("%s: %s: cannot find its other mounts: %s", shown, signal_name, error)
            return
        if copies is not None:
            _log.warning(
                "%s: %s: unmounted here, but %s; it goes on until that is unmounted; a second "
                "signal ends it by force",
                *(shown, signal_name, copies),
            )

    async def _flush(self) -> bool:
        """Have the kernel write back its dirty pages, and make all disks durable.

        A failure of one disk is logged, and the other disks are made durable all the same.

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
            if self._is_mounted():
                await trio.to_thread.run_sync(sync_mount, self._mountpoint, abandon_on_cancel=True)
        for exported in self._disks:
            with failing():
                if self._laundering is not None and exported.writers:
                    # syncfs(2) has started the writeback, but the kernel need not wait for it.
                    await self._laundering.launder(exported)
            with failing():
                await exported.disk.flush()
        return durable

    async def _force(self) -> None:
        """Unmount although the mount may be in use, after up to 10 seconds for its data."""
        if self._disks.open_handles:
            _log.warning(
                "%s: second signal: ended while in use: programs that have it open, such as a "
                "loop device, get I/O errors from now on",
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
            if self._is_mounted():
                await trio.to_thread.run_sync(
                    lambda: unmount(self._mountpoint, lazy=True), abandon_on_cancel=True
                )
        except _FAILURES as error:
            _log.warning("%s", error)
        pyfuse3.terminate()
