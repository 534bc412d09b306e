"""Unmounting on signals: the first unmounts when the mount is idle, a second SIGTERM by force.

While a loop device or a program has a disk open, the kernel refuses to unmount, and a forced
unmount would cause I/O errors in the file system on that disk.  So after the first signal the
server makes all data durable, and serves the disks until the last close.  It does the same if the
mount was detached before (``umount -l``), or if the file system is mounted elsewhere as well.
After a second SIGTERM or SIGINT it unmounts even if disks are open.

A SIGHUP never counts as the second signal.  At the end of a login session, logind has systemd send
SIGTERM and SIGHUP to each process of the session (``SendSIGHUP=`` in systemd.kill(5)), while the
file systems on the disks are still being unmounted.  And after Ctrl-C the user may close the
terminal, which also sends SIGHUP.

The first signal and the one that forces the end each start a task in the nursery of the mount.
These tasks call `pyfuse3.terminate`, which needs the session of libfuse.  They also flush disks,
which must not happen during a close.  So the caller must cancel the nursery, and wait for its end,
before it closes the connection and the disks.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from qedfuse.errors import HostError, QedError
from qedfuse.mount.durability import flush_mount
from qedfuse.mount.system.mounttable import find_mount
from qedfuse.mount.system.unmount import BusyError
from qedfuse.text import printable
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisks
    from qedfuse.mount.fuse.laundering import Laundering
    from qedfuse.mount.process.unmounter import Unmounter

_log = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0
"""Maximum pause between two attempts to unmount while the mount is in use.  The server must try
again, because the kernel does not report when a process leaves a working directory in the mount."""
_FORCED_SYNC_SECONDS: Final = 10.0
"""Maximum time for which a forced unmount waits until all data is durable.  If a write-back cycle
is running at the end of this time, the unmount waits for the end of the cycle as well."""
_SLOW_FLUSH_SECONDS: Final = 5.0
"""Time after which it is logged that not everything is durable yet."""
_UNTIL_LAST_CLOSE: Final = "the mount goes on until the last close; "
_FAILURES: Final = (OSError, QedError)
"""Exceptions that are logged, and after which the shutdown goes on."""


class Shutdown:
    """Unmounts one mount when signals arrive.

    Attributes:
        failure: The error if a forced unmount ended before all data was durable; otherwise None.
    """

    def __init__(
        self,
        disks: ExportedDisks,
        laundering: Laundering | None,
        mountpoint: str,
        device: str,
        unmounter: Unmounter,
        disconnect: Callable[[], object],
        nursery: trio.Nursery,
    ) -> None:
        """Prepare the shutdown; no signal has arrived yet.

        Args:
            disks: The disks of the mount.
            laundering: Makes the kernel write back its dirty pages; None if it caches no pages.
            mountpoint: The mountpoint.
            device: The device number of the mount, ``MAJOR:MINOR``.  Nothing is unmounted if the
                mountpoint shows another file system.
            unmounter: Unmounts the mountpoint.
            disconnect: Ends the connection to the kernel; called after `pyfuse3.terminate`.
            nursery: Runs the tasks that signals start.
        """
        self.failure: QedError | None = None
        self._disks = disks
        self._laundering = laundering
        self._mountpoint = mountpoint
        self._device = device
        self._unmounter = unmounter
        self._disconnect = disconnect
        self._nursery = nursery
        self._is_ending = False
        # Number of signals that count for the end by force.
        self._requests_to_end = 0

    def receive(self, name: str) -> None:
        """Start to act on the signal ``name``.

        The first signal starts the unmount, and the second one that is not SIGHUP the unmount by
        force.  Any other signal has no effect.
        """
        if not self._is_ending:
            self._is_ending = True
            self._nursery.start_soon(self._unmount_when_idle, name)
        # The order in which SIGTERM and SIGHUP arrive is undefined, so a SIGHUP that came first
        # does not count either.
        if name != "SIGHUP":
            self._requests_to_end += 1
            if self._requests_to_end == 2:  # noqa: PLR2004
                self._nursery.start_soon(self._force)

    def _is_mounted(self) -> bool:
        """Return whether the topmost mount on the mountpoint is this mount."""
        entry = find_mount(self._mountpoint)
        return entry is not None and entry.device == self._device

    async def _unmount_when_idle(self, signal_name: str) -> None:
        """Unmount when the mount is not in use, which ends `pyfuse3.main`.

        If the file system is mounted elsewhere as well, `pyfuse3.main` goes on.  If the mountpoint
        does not show this mount any more, `pyfuse3.main` ends when no disk is open.  A mount that
        is in use is made durable once, whatever the reason for which it is not unmounted: a service
        manager may kill the server some time after its signal.
        """
        has_tried_flush = is_failure_logged = False
        while True:
            all_closed = self._disks.all_closed_event()
            try:
                if self._is_mounted():
                    # In a thread, because the kernel sends dirty pages to this server meanwhile.
                    await run_in_thread(self._unmounter.unmount, abandon_on_cancel=True)
                    break
                # Another process has detached the mount, or another mount covers it.
                if not self._disks.open_handles:
                    self._terminate()
                    return
                in_use, goes_on = True, _UNTIL_LAST_CLOSE
            except BusyError:
                in_use, goes_on = True, _UNTIL_LAST_CLOSE
            except _FAILURES as error:
                # The next attempt may fail as well, so the last close need not end the mount.
                in_use, goes_on = self._disks.open_handles > 0, ""
                if not is_failure_logged:
                    is_failure_logged = True
                    _log.warning("%s: %s", signal_name, error)
            if in_use and not has_tried_flush:
                has_tried_flush = True
                await self._flush_and_log(
                    f"{signal_name}: still in use: ",
                    f"{goes_on}a second SIGTERM or SIGINT ends the mount by force",
                )
            with trio.move_on_after(_RETRY_SECONDS):
                await all_closed.wait()
        await self._report_other_mounts(signal_name)

    async def _report_other_mounts(self, signal_name: str) -> None:
        """Make everything durable and log where the file system is mounted after the unmount.

        Normally the server ends within `_RETRY_SECONDS`, which cancels this task.
        """
        await trio.sleep(_RETRY_SECONDS)
        try:
            mounts = await run_in_thread(
                self._unmounter.describe_visible_mounts, self._device, abandon_on_cancel=True
            )
        except _FAILURES as error:
            _log.warning(
                "%s: %s: cannot find where else the disks are mounted: %s",
                *(printable(self._mountpoint), signal_name, error),
            )
            await self._flush()
            return
        if mounts is None and self._disks.open_handles:
            mounts = "still in use"  # through a mount that is not visible here
        if mounts is None:
            await self._flush()
        else:
            await self._flush_and_log(
                f"{signal_name}: unmounted here, but {mounts}; ",
                "the server goes on until no mount is left; a second SIGTERM or SIGINT ends the "
                "server by force",
            )

    async def _flush_and_log(self, start: str, end: str) -> None:
        """Make everything durable; log between the texts ``start`` and ``end`` whether it is.

        If a host does not answer, this takes any length of time, so the texts are also logged after
        `_SLOW_FLUSH_SECONDS`.
        """

        def log(durability: str) -> None:
            _log.warning("%s: %s%s; %s", printable(self._mountpoint), start, durability, end)

        async def log_if_slow() -> None:
            await trio.sleep(_SLOW_FLUSH_SECONDS)
            log("not everything is durable yet")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(log_if_slow)
            durable = await self._flush()
            nursery.cancel_scope.cancel()
        log("everything is durable now" if durable else "not everything is durable")

    async def _flush(self) -> bool:
        """Make everything durable; return whether that succeeded, as `flush_mount` does."""
        return await flush_mount(self._disks, self._laundering, self._mountpoint, self._is_mounted)

    async def _force(self) -> None:
        """Make all disks durable, detach the mount even if it is in use, and end `pyfuse3.main`.

        ``failure`` is set if making all data durable fails or takes longer than
        `_FORCED_SYNC_SECONDS`.
        """
        if self._disks.open_handles:
            _log.warning(
                "%s: second signal: ending while in use: programs and loop devices that have a "
                "disk open will get I/O errors",
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
                await run_in_thread(
                    lambda: self._unmounter.unmount(lazy=True), abandon_on_cancel=True
                )
        except _FAILURES as error:
            _log.warning("%s", error)
        self._terminate()

    def _terminate(self) -> None:
        """Fail every read that waits for a server or for qemu-nbd, then end `pyfuse3.main`.

        `pyfuse3.main` takes no request any more, but it waits for those that wait for a host, which
        may not answer.  So the connection ends here.  Otherwise all programs would wait as long,
        also those that use other disks.
        """
        self._disks.stop_fetching()
        pyfuse3.terminate()
        try:
            self._disconnect()
        except OSError as error:  # no free descriptor: the programs wait for the end of the server
            _log.warning("%s: cannot end the connection: %s", printable(self._mountpoint), error)
