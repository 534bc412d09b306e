"""``qedfuse umount``: unmount, and return when the process that served the mount has ended."""

from __future__ import annotations

import os
import select
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.errors import MountpointError, QedError
from qedfuse.mount.system.boundedcall import Deadline, call_in_child
from qedfuse.mount.system.mountcopies import describe_copies
from qedfuse.mount.system.mountpoint import is_below, resolve, resolve_mounted
from qedfuse.mount.system.mountrecord import (
    FoundRecord,
    MountRecord,
    find_record,
    process_start,
    record_directories,
    take_record,
)
from qedfuse.mount.system.mounttable import MountEntry, find_mount, find_qedfuse_mount
from qedfuse.mount.system.unmount import BusyError, unmount
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MILLISECONDS_PER_SECOND: Final = 1000
_MIN_ATTEMPT_SECONDS: Final = 2.0
"""Shortest time limit for the unmount itself, which takes some milliseconds."""
_COPIES_REPORT_SECONDS: Final = 1.0
"""Time after which copies of the mount are reported if the process has not ended."""
_REPORT_SECONDS: Final = 10.0
"""Time after which a process that has not ended is reported for any reason."""


class UnmountFailedError(QedError):
    """The mount has not been unmounted in time, or its process failed or did not end in time."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code  # type: ignore[misc]


def unmount_and_wait(
    path: str, seconds: float | None = None, report: Callable[[str], None] = lambda _line: None
) -> None:
    """Unmount and wait until all data is durable and the images are closed and unlocked.

    The process is never killed: if it takes long, it is writing, or the mount has a copy in
    another mount namespace.

    Args:
        path: The mountpoint.
        seconds: The time limit; None for none.  With 0 the process is not waited for.
        report: Called with a line about the reason if the wait is long.

    Raises:
        MountpointError: The path is no mount of qedfuse, or the mount is in use.
        UnmountFailedError: The process failed at the end, does not answer, or has not ended
            in time.
    """
    deadline = Deadline(seconds)
    attempt = Deadline(None if seconds is None else max(seconds, _MIN_ATTEMPT_SECONDS))
    waited = "" if seconds is None else f" (waited {seconds:g} s)"
    try:
        mountpoint, entry, found = call_in_child(partial(_find, path), attempt.remaining())
    except TimeoutError:
        msg = f"{printable(path)}: not unmounted: a path to it does not answer{waited}"
        raise UnmountFailedError(msg) from None
    shown = printable(mountpoint)
    process = None if found is None else _open_process(found.record)
    try:
        try:
            call_in_child(partial(_unmount, mountpoint, entry), attempt.remaining())
        except TimeoutError:
            if _is_mounted(mountpoint, entry):
                server = (
                    "the process that serves it" if found is None else f"process {found.record.pid}"
                )
                msg = f"{shown}: not unmounted: {server} does not answer{waited}"
                raise UnmountFailedError(msg) from None
        if found is None and _may_hide_records(mountpoint, entry.owner):
            # The record is visible only now; a process that has ended well has removed it.
            found = find_record(entry.device, entry.owner)
            if found is None:
                return
            process = _open_process(found.record)
        if found is None:
            msg = f"{shown}: unmounted, but found no record of its process: it may still be writing"
            raise UnmountFailedError(msg)
        if process is not None:
            server_process = ServerProcess(process, found.record.pid, entry)
            if not server_process.wait(
                deadline.remaining(), lambda line: report(f"{shown}: {line}")
            ):
                msg = f"{shown}: {server_process.describe()}{waited}"
                raise UnmountFailedError(msg)
    finally:
        if process is not None:
            os.close(process)
    _raise_recorded_failure(shown, entry, found.path)


def _find(path: str) -> tuple[str, MountEntry, FoundRecord | None]:
    """Return the mountpoint that a path leads to, the mount, and its record if there is one."""
    mountpoint = resolve_mounted(path)
    entry = find_qedfuse_mount(mountpoint)
    return mountpoint, entry, find_record(entry.device, entry.owner)


def _is_mounted(mountpoint: str, entry: MountEntry) -> bool:
    """Return whether a mount still exists."""
    now = find_mount(mountpoint)
    return now is not None and now.device == entry.device


def _may_hide_records(mountpoint: str, owner: int) -> bool:
    """Return whether a mount may cover a directory of its owner's mount records."""
    return any(is_below(resolve(str(path)), mountpoint) for path in record_directories(owner))


def _unmount(mountpoint: str, entry: MountEntry) -> None:
    """Unmount; succeed also if another process has unmounted at the same time."""
    try:
        unmount(mountpoint)
    except BusyError as error:
        msg = (
            f"{error} (a loop device or a program has it open; "
            f"see: losetup -l, fuser -vm {printable(mountpoint)})"
        )
        raise MountpointError(msg) from error
    except QedError:
        if _is_mounted(mountpoint, entry):
            raise


def _open_process(record: MountRecord) -> int | None:
    """Return a pidfd of the process that wrote a record; None if that has ended."""
    try:
        fd = os.pidfd_open(record.pid)
    except OSError:
        return None
    # Compared only after the open: while the descriptor is open the pid is not reused.
    if process_start(record.pid) != record.started:
        os.close(fd)
        return None
    return fd


class ServerProcess:
    """The process that served a mount, until its end."""

    def __init__(self, process: int, pid: int, entry: MountEntry) -> None:
        """Wait for the process ``pid`` by its pidfd; it served the mount ``entry``."""
        self._process = process
        self._pid = pid
        self._entry = entry

    def wait(self, seconds: float | None, report: Callable[[str], None]) -> bool:
        """Wait for the end of the process; return False if it has not ended in ``seconds``.

        With None the wait has no limit.  ``report`` is called once if the wait is long, and
        earlier if the reason is known.
        """
        start = time.monotonic()
        reported = False
        for elapsed in (_COPIES_REPORT_SECONDS, _REPORT_SECONDS):
            if seconds is not None and seconds <= elapsed:
                break
            if self._has_ended(start + elapsed - time.monotonic()):
                return True
            if not reported and (elapsed == _REPORT_SECONDS or self._copies() is not None):
                report(self.describe())
                reported = True
        return self._has_ended(None if seconds is None else start + seconds - time.monotonic())

    def _has_ended(self, seconds: float | None) -> bool:
        """Wait for up to ``seconds``; return whether the process has ended."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(
            poll.poll(None if seconds is None else max(0.0, seconds) * _MILLISECONDS_PER_SECOND)
        )

    def describe(self) -> str:
        """Return one line about why the process has not ended."""
        copies = self._copies()
        if copies is None:
            return (
                f"unmounted, but process {self._pid} has not ended: it writes, does not run, or "
                "the mount has a copy in a mount namespace that cannot be seen (SIGTERM twice "
                "to the process ends it)"
            )
        return f"unmounted here, but {copies}; process {self._pid} goes on until that is unmounted"

    def _copies(self) -> str | None:
        """Describe where else the file system is mounted; None if no other mount is visible."""
        found = find_record(self._entry.device, self._entry.owner)
        if found is not None and found.record.pid != self._pid:
            return None  # the file system is gone, and a new one has its device number
        return describe_copies(self._entry.device, self._entry)


def _raise_recorded_failure(shown: str, entry: MountEntry, path: Path) -> None:
    """Remove the record of a process that has ended, and raise the failure in it.

    Raises:
        UnmountFailedError: There was a record; a process that ends well removes its own.
    """
    record = take_record(path, entry.owner)
    if record is None:
        return
    if record.failure is not None:
        msg = f"{shown}: unmounted, but its process failed: {printable(record.failure)}"
        raise UnmountFailedError(msg, record.exit_code or None)
    msg = f"{shown}: unmounted, but its process had ended without closing the images cleanly"
    raise UnmountFailedError(msg)
