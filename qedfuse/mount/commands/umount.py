"""``qedfuse umount``: unmount, and return when the process that served it is gone."""

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

_MILLISECONDS: Final = 1000
_MIN_ATTEMPT_SECONDS: Final = 2.0
"""Shortest time for the unmount itself, which takes some milliseconds."""
_MOMENT_SECONDS: Final = 1.0
"""When to look for copies of a mount whose process has not ended."""
_LONG_SECONDS: Final = 10.0
"""When to report a process that has not ended for a reason that cannot be seen."""


class UnmountFailedError(QedError):
    """The mount has gone, but its process reported a failure, or did not report at all."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code  # type: ignore[misc]


def unmount_and_wait(
    path: str, seconds: float | None = None, report: Callable[[str], None] = lambda _line: None
) -> None:
    """Unmount and wait until everything is durable, unlocked and closed.

    Nothing is ever killed: a process that takes long is writing, or the mount has a copy
    elsewhere.

    Args:
        path: The mountpoint.
        seconds: How long all that may take; None for as long as it takes.
        report: Called with a line that says what is being waited for, if that takes long.

    Raises:
        MountpointError: It is not a mount of ours, or it is in use.
        UnmountFailedError: The process failed at the end, or does not answer or has not
            ended in time.
    """
    deadline = Deadline(seconds)
    # A timeout of 0 unmounts and does not wait for the process.
    attempt = Deadline(None if seconds is None else max(seconds, _MIN_ATTEMPT_SECONDS))
    waited = "" if seconds is None else f" (waited {seconds:g} s)"
    try:
        mountpoint, entry, found = call_in_child(partial(_find, path), attempt.remaining())
    except TimeoutError:
        msg = f"{printable(path)}: not unmounted: a path to it does not answer{waited}"
        raise UnmountFailedError(msg) from None
    shown = printable(mountpoint)
    process = None if found is None else _open_process(found[1])
    try:
        try:
            call_in_child(partial(_take_away, mountpoint, entry), attempt.remaining())
        except TimeoutError:
            if _is_mounted(mountpoint, entry):
                server = (
                    "the process that serves it" if found is None else f"process {found[1].pid}"
                )
                msg = f"{shown}: not unmounted: {server} does not answer{waited}"
                raise UnmountFailedError(msg) from None
        if found is None and _hides_notes(mountpoint, entry.owner):
            # Only now can the note be seen; a process that has ended well has removed it.
            found = find_record(entry.device, entry.owner)
            if found is None:
                return
            process = _open_process(found[1])
        if found is None:
            msg = f"{shown}: unmounted, but found no note of its process: it may still be writing"
            raise UnmountFailedError(msg)
        if process is not None:
            ending = _Ending(process, found[1].pid, entry)
            if not ending.wait(deadline.remaining(), lambda line: report(f"{shown}: {line}")):
                msg = f"{shown}: {ending.describe()}{waited}"
                raise UnmountFailedError(msg)
    finally:
        if process is not None:
            os.close(process)
    _report(shown, entry, found[0])


def _find(path: str) -> tuple[str, MountEntry, tuple[Path, MountRecord] | None]:
    """Return the mountpoint that a path leads to, the mount, and the note of its process."""
    mountpoint = resolve_mounted(path)
    entry = find_qedfuse_mount(mountpoint)
    return mountpoint, entry, find_record(entry.device, entry.owner)


def _is_mounted(mountpoint: str, entry: MountEntry) -> bool:
    """Return whether a mount is still there."""
    now = find_mount(mountpoint)
    return now is not None and now.device == entry.device


def _hides_notes(mountpoint: str, owner: int) -> bool:
    """Tell whether the notes of a user's mounts may lie under a mountpoint."""
    return any(is_below(resolve(str(path)), mountpoint) for path in record_directories(owner))


def _take_away(mountpoint: str, entry: MountEntry) -> None:
    """Unmount, unless somebody else does it at the same time."""
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


def _open_process(note: MountRecord) -> int | None:
    """Get hold of the process that wrote a note; None if it is gone already."""
    try:
        fd = os.pidfd_open(note.pid)
    except OSError:
        return None
    # Looked at only now: while the descriptor is open the pid is not given away again.
    if process_start(note.pid) != note.started:
        os.close(fd)
        return None
    return fd


class _Ending:
    """The process of a mount that has been unmounted, on its way to its end."""

    def __init__(self, process: int, pid: int, entry: MountEntry) -> None:
        """Watch the process ``pid`` by its descriptor; it served the mount ``entry``."""
        self._process = process
        self._pid = pid
        self._entry = entry

    def wait(self, seconds: float | None, report: Callable[[str], None]) -> bool:
        """Return whether the process has ended in ``seconds``; None is for ever.

        ``report`` is called once if the wait is long, and early where the reason is seen.
        """
        start = time.monotonic()
        reported = False
        for moment in (_MOMENT_SECONDS, _LONG_SECONDS):
            if seconds is not None and seconds <= moment:
                break
            if self._has_ended(start + moment - time.monotonic()):
                return True
            if not reported and (moment == _LONG_SECONDS or self._copies() is not None):
                report(self.describe())
                reported = True
        return self._has_ended(None if seconds is None else start + seconds - time.monotonic())

    def _has_ended(self, seconds: float | None) -> bool:
        """Wait for the end for up to ``seconds``; return False if it has not come."""
        poll = select.poll()
        poll.register(self._process, select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * _MILLISECONDS))

    def describe(self) -> str:
        """Say on one line why the process goes on."""
        copies = self._copies()
        if copies is None:
            return (
                f"unmounted, but process {self._pid} has not ended: it writes, does not run, or "
                "the mount has a copy in a mount namespace that cannot be seen (SIGTERM twice "
                "to the process ends it)"
            )
        return f"unmounted here, but {copies}; process {self._pid} goes on until that is unmounted"

    def _copies(self) -> str | None:
        """Say where else the file system is mounted; None if that cannot be seen."""
        found = find_record(self._entry.device, self._entry.owner)
        if found is not None and found[1].pid != self._pid:
            return None  # the file system has gone, and a new one has its number
        return describe_copies(self._entry.device, self._entry)


def _report(shown: str, entry: MountEntry, path: Path) -> None:
    """Tell what the process left behind: nothing if all went well.

    Raises:
        UnmountFailedError: It left a note.
    """
    note = take_record(path, entry.owner)
    if note is None:
        return
    if note.failure is not None:
        msg = f"{shown}: unmounted, but its process failed: {printable(note.failure)}"
        raise UnmountFailedError(msg, note.exit_code or None)
    msg = f"{shown}: unmounted, but its process had ended without closing the images cleanly"
    raise UnmountFailedError(msg)
