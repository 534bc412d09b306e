"""``qedfuse umount``: unmount, and wait for the end of the process that served the mount."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, MountpointError, QedError
from qedfuse.mount.commands.serverprocess import ServerProcess, open_server
from qedfuse.mount.system.boundedcall import Deadline, call_in_child
from qedfuse.mount.system.mountpoint import is_below, resolve, resolve_mounted
from qedfuse.mount.system.mounttable import MountEntry, find_mount, find_own_mount
from qedfuse.mount.system.recorddirectory import record_directories
from qedfuse.mount.system.recordlookup import FoundRecord, find_record, take_record
from qedfuse.mount.system.unmount import BusyError, unmount
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_MIN_ATTEMPT_SECONDS: Final = 2.0
"""Minimum time limit for the unmount itself, which normally takes some milliseconds."""


class UnmountFailedError(QedError):
    """The mount does not answer, or its process has failed or may still be running.

    Attributes:
        exit_code: The exit code of the process that served the mount, if it recorded one;
            otherwise that of `QedError`.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


def unmount_and_wait(
    path: str, seconds: float | None = None, report: Callable[[str], None] = lambda _line: None
) -> None:
    """Unmount and wait until all data is durable and the images are closed and unlocked.

    The process that serves the mount is never killed.  The wait is long if the process still writes
    or is suspended (SIGSTOP), or if the file system is mounted elsewhere as well.  The calling
    process must have only one thread (`call_in_child`).

    Args:
        path: The mountpoint, or a symbolic link to the mountpoint.
        seconds: The time limit; None for no limit, 0 not to wait for the end of the process.  With
            a limit below 2 seconds, the unmount itself may still take 2 seconds.
        report: If the wait is long, called once, with a line about the reason.

    Raises:
        MountpointError: The path leads to no mount of qedfuse, or the mount is in use.
        PrivilegeError: The caller may not unmount this mount.
        UnmountFailedError: The process does not answer, has failed, has not ended in time, or
            cannot be found.  The message says whether the mount is still there.
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
        pidfd = None if found is None else open_server(found.record)
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
            # The mount may have hidden its record from `_find`.  If there is none now either, the
            # process has most likely ended without a failure, and has removed its record.
            with _host_errors_explained(
                f"{shown}: unmounted, but the process may still be writing"
            ):
                found = find_record(entry.device, entry.owner)
                if found is None:
                    return
                pidfd = open_server(found.record)
        if found is None:
            # The mount did not hide the record from `_find`, so there was none that could be read.
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
    """Return the mountpoint to which a path leads, its mount, and its record, which may be None.

    Called in a child process, because the path may lead through a mount that does not answer.
    """
    mountpoint = resolve_mounted(path)
    entry = find_own_mount(mountpoint, "unmount it")
    try:
        found = find_record(entry.device, entry.owner)
    except HostError:
        # The record may lie under the mount, and the server may have ended or refuse the caller.
        found = None
    return mountpoint, entry, found


def _waited(seconds: float | None) -> str:
    """Return the end of a message that says how long was waited; empty without a limit."""
    return "" if seconds is None else f" (waited {seconds:g} s)"


@contextmanager
def _host_errors_explained(state: str) -> Iterator[None]:
    """Turn a HostError of the block into an UnmountFailedError that begins with ``state``."""
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
    """Return whether the owner's mount records may lie in a directory that the mount covers."""
    return any(is_below(resolve(str(path)), mountpoint) for path in record_directories(owner))


def _unmount(mountpoint: str, entry: MountEntry) -> None:
    """Unmount the mount ``entry``; also succeed if another process unmounts it concurrently."""
    try:
        unmount(mountpoint)
    except BusyError as error:
        msg = (
            f"{error} (a loop device or a program has a disk open; "
            f"see: losetup -l, fuser -vm {printable(mountpoint)})"
        )
        raise MountpointError(msg) from error
    except QedError as error:
        try:
            if not _is_mounted(mountpoint, entry):
                return
        except (QedError, OSError):
            # The mount table cannot be read, so the mount counts as still there.
            raise error from None
        raise


def _raise_recorded_failure(shown: str, entry: MountEntry, path: Path) -> None:
    """Raise UnmountFailedError if the ended process has left its record; remove the record.

    A process that ends without a failure removes its own record.
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
