"""``qedfuse umount``: unmount, and wait for the end of the process that served the mount."""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, MountpointError, QedError
from qedfuse.mount.system.boundedcall import Deadline, call_in_child
from qedfuse.mount.system.mountpoint import is_below, resolve, resolve_mounted
from qedfuse.mount.system.mountrecord import MountRecord, has_ended
from qedfuse.mount.system.mounttable import MountEntry, find_mount, find_own_mount
from qedfuse.mount.system.recorddirectory import record_directories
from qedfuse.mount.system.recordlookup import FoundRecord, find_record, take_record
from qedfuse.mount.system.unmount import BusyError, unmount
from qedfuse.mount.system.visiblemounts import describe_visible_mounts
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MILLISECONDS_PER_SECOND: Final = 1000
_MIN_ATTEMPT_SECONDS: Final = 2.0
"""Minimum time limit for the unmount itself, which normally takes some milliseconds."""
_COPIES_REPORT_SECONDS: Final = 1.0
"""Time after which the reason of a long wait is reported, if the file system is mounted elsewhere
as well.  If the caller's time limit is not longer than this, nothing is reported."""
_REPORT_SECONDS: Final = 10.0
"""Time after which the reason of a long wait is reported in all other cases.  If the caller's
time limit is not longer than this, nothing is reported."""


class UnmountFailedError(QedError):
    """The mount does not answer, or its process has failed or may still be running.

    Attributes:
        exit_code: The exit code of the process that served the mount, if it recorded one;
            otherwise that of `QedError`.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code  # type: ignore[misc]


def unmount_and_wait(
    path: str, seconds: float | None = None, report: Callable[[str], None] = lambda _line: None
) -> None:
    """Unmount and wait until all data is durable and the images are closed and unlocked.

    The process that serves the mount is never killed.  If the process does not end for a long
    time, the process is still writing or is stopped, or the file system is mounted elsewhere as
    well.

    Args:
        path: The mountpoint, or a symbolic link to the mountpoint.
        seconds: The time limit; None for no limit.  With 0 this function does not wait for the
            end of the process, and raises if the process has not ended.  The unmount itself may
            take up to 2 seconds, even if the limit is shorter.
        report: Called at most once, with a line about the reason if the wait is long.

    Raises:
        MountpointError: The path is no mount of qedfuse, or the mount is in use.
        PrivilegeError: The mount belongs to another user, and the caller is not root.
        UnmountFailedError: The process does not answer, has failed, was killed, has not ended in
            time, cannot be waited for, or has no record by which to find it.  The message says
            whether the mount is still there.
        QedError: The mount cannot be unmounted for another reason.
    """
    deadline = Deadline(seconds)
    attempt_seconds = None if seconds is None else max(seconds, _MIN_ATTEMPT_SECONDS)
    unmount_deadline = Deadline(attempt_seconds)
    try:
        mountpoint, entry, found = call_in_child(partial(_find, path), unmount_deadline.remaining())
    except TimeoutError:
        msg = f"{printable(path)}: not unmounted: a mount on this path does not answer"
        msg += _waited(attempt_seconds)
        raise UnmountFailedError(msg) from None
    shown = printable(mountpoint)
    with _host_errors_explained(f"{shown}: not unmounted"):
        pidfd = None if found is None else _open_process(found.record)
    try:
        try:
            call_in_child(partial(_unmount, mountpoint, entry), unmount_deadline.remaining())
        except TimeoutError:
            if _is_mounted(mountpoint, entry):
                server = (
                    "the process that serves the mount"
                    if found is None
                    else f"process {found.record.pid}"
                )
                msg = f"{shown}: not unmounted: {server} does not answer{_waited(attempt_seconds)}"
                raise UnmountFailedError(msg) from None
        if found is None and _may_hide_records(mountpoint, entry.owner):
            # The mount may have hidden its record from `_find`, so search again.  If there is no
            # record now, the process has normally ended without a failure, and has removed it.
            with _host_errors_explained(
                f"{shown}: unmounted, but the process may still be writing"
            ):
                found = find_record(entry.device, entry.owner)
                if found is None:
                    return
                pidfd = _open_process(found.record)
        if found is None:
            # The mount cannot have hidden a record from `_find`, so the mount had no record, or
            # none that can be read.
            msg = (
                f"{shown}: unmounted, but found no record of the process that served the mount: "
                "the process may still be writing"
            )
            raise UnmountFailedError(msg)
        if pidfd is not None:
            server_process = ServerProcess(pidfd, found.record.pid, entry)
            if not server_process.wait(
                deadline.remaining(), lambda line: report(f"{shown}: {line}")
            ):
                msg = f"{shown}: {server_process.describe()}{_waited(seconds)}"
                raise UnmountFailedError(msg)
    finally:
        if pidfd is not None:
            os.close(pidfd)
    _raise_recorded_failure(shown, entry, found.path)


def _find(path: str) -> tuple[str, MountEntry, FoundRecord | None]:
    """Return the mountpoint to which a path leads, its mount, and the record of the mount.

    The record is None if there is no record, or it cannot be read.  The caller must make this call
    by `call_in_child`, because the call may block if the path leads through a mount whose server
    does not answer.

    Raises:
        MountpointError: The path leads to no mount of qedfuse.
        PrivilegeError: The mount belongs to another user, and the caller is not root.
    """
    mountpoint = resolve_mounted(path)
    entry = find_own_mount(mountpoint, "unmount it")
    try:
        found = find_record(entry.device, entry.owner)
    except HostError:
        # The mount may cover the directory of its record.  Then the record cannot be read if the
        # caller has no access to the mount, or if the server has ended.
        found = None
    return mountpoint, entry, found


def _waited(seconds: float | None) -> str:
    """Return the end of a message that says how long was waited; empty without a limit."""
    return "" if seconds is None else f" (waited {seconds:g} s)"


@contextmanager
def _host_errors_explained(state: str) -> Iterator[None]:
    """Turn a `HostError` of the block into an error that says what state the mount is in.

    Args:
        state: The mountpoint and the state, with which the message of the error begins.

    Raises:
        UnmountFailedError: The block has raised a `HostError`.
    """
    try:
        yield
    except HostError as error:
        msg = f"{state}: {error}"
        raise UnmountFailedError(msg) from error


def _is_mounted(mountpoint: str, entry: MountEntry) -> bool:
    """Return whether the mountpoint still shows the mount ``entry``."""
    now = find_mount(mountpoint)
    return now is not None and now.device == entry.device


def _may_hide_records(mountpoint: str, owner: int) -> bool:
    """Return whether a mount may cover a directory of its owner's mount records."""
    return any(is_below(resolve(str(path)), mountpoint) for path in record_directories(owner))


def _unmount(mountpoint: str, entry: MountEntry) -> None:
    """Unmount the mount ``entry``; also succeed if another process unmounts it concurrently.

    Raises:
        MountpointError: The mount is in use.
        QedError: The mount cannot be unmounted for another reason.
    """
    try:
        unmount(mountpoint)
    except BusyError as error:
        msg = (
            f"{error} (a loop device or a program has a disk open; "
            f"see: losetup -l, fuser -vm {printable(mountpoint)})"
        )
        raise MountpointError(msg) from error
    except QedError:
        if _is_mounted(mountpoint, entry):
            raise


def _open_process(record: MountRecord) -> int | None:
    """Return a pidfd of the process that wrote a record; None if the process has ended.

    Raises:
        HostError: The process may still be running, but cannot be opened or identified.
    """
    with ExitStack() as undo:
        try:
            fd = os.pidfd_open(record.pid)
            undo.callback(os.close, fd)
        except OSError as error:
            if isinstance(error, ProcessLookupError) or has_ended(record):
                return None
            name = f"process {record.pid}"
            raise HostError.from_os(error, name, "cannot wait for its end") from error
        # The start time is compared after the open, because before the open the process could
        # still end, and a later process could get its pid.  If the start time matches now, the
        # descriptor is that of the process that wrote the record.
        if has_ended(record):
            return None
        undo.pop_all()
    return fd


class ServerProcess:
    """The process that served a mount, and for whose end the caller waits."""

    def __init__(self, pidfd: int, pid: int, entry: MountEntry) -> None:
        """Use the process ``pid``, open as ``pidfd``, which served the mount ``entry``."""
        self._pidfd = pidfd
        self._pid = pid
        self._entry = entry

    def wait(self, seconds: float | None, report: Callable[[str], None]) -> bool:
        """Wait for the end of the process; return False if it has not ended in ``seconds``.

        Args:
            seconds: The time limit; None for no limit; 0 to return immediately.
            report: Called at most once, with a line about why the process has not ended.  The
                call is made after `_COPIES_REPORT_SECONDS` if the file system is mounted
                elsewhere as well, and otherwise after `_REPORT_SECONDS`.  If the time limit is
                over by then, there is no call.
        """
        start = time.monotonic()
        reported = False
        for elapsed in (_COPIES_REPORT_SECONDS, _REPORT_SECONDS):
            if seconds is not None and seconds <= elapsed:
                break
            if self._has_ended(start + elapsed - time.monotonic()):
                return True
            if not reported and (
                elapsed == _REPORT_SECONDS or self._describe_other_mounts() is not None
            ):
                report(self.describe())
                reported = True
        return self._has_ended(None if seconds is None else start + seconds - time.monotonic())

    def _has_ended(self, seconds: float | None) -> bool:
        """Wait for at most ``seconds``; return whether the process has ended.

        None means no limit, and 0 or less means not to wait.
        """
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(
            poll.poll(None if seconds is None else max(0.0, seconds) * _MILLISECONDS_PER_SECOND)
        )

    def describe(self) -> str:
        """Return one line about why the process has not ended."""
        mounts = self._describe_other_mounts()
        if mounts is None:
            return (
                f"unmounted, but process {self._pid} has not ended: the process is writing or "
                "stopped, or the mount has a copy in a mount namespace that is not visible here "
                "(to end the process, send SIGTERM to it twice)"
            )
        return f"unmounted here, but {mounts}; process {self._pid} goes on until no mount is left"

    def _describe_other_mounts(self) -> str | None:
        """Describe where else the file system is mounted; None if no other mount is visible."""
        try:
            found = find_record(self._entry.device, self._entry.owner)
        except HostError:
            found = None
        if found is not None and found.record.pid != self._pid:
            # The file system is gone, and the kernel has given its device number to a new mount,
            # whose record was found.
            return None
        return describe_visible_mounts(self._entry.device, self._entry)


def _raise_recorded_failure(shown: str, entry: MountEntry, path: Path) -> None:
    """Raise an error if the process, which has ended, has left its record; remove the record.

    Raises:
        UnmountFailedError: There is a record, or the record cannot be read.  A process that ends
            without a failure removes its own record, so this one has failed or was killed.
    """
    with _host_errors_explained(
        f"{shown}: unmounted, but the process that served the mount may have failed"
    ):
        record = take_record(path, entry.owner)
    if record is None:
        return
    if record.failure is not None:
        reason = printable(record.failure)
        msg = f"{shown}: unmounted, but the process that served the mount has failed: {reason}"
        raise UnmountFailedError(msg, record.exit_code or None)
    msg = (
        f"{shown}: unmounted, but the process that served the mount has ended without closing "
        "the images cleanly"
    )
    raise UnmountFailedError(msg)
