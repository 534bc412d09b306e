"""``qedfuse umount``: unmount, and return when the process that served it is gone."""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, Final

from qedfuse.errors import MountpointError, QedError
from qedfuse.mount.mountpoint import resolve
from qedfuse.mount.mounttable import FUSE_TYPE, MountEntry, find_mount
from qedfuse.mount.runtime import MountNote, find_note, process_start, read_note
from qedfuse.mount.unmount import BusyError, unmount
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from pathlib import Path

_MILLISECONDS: Final = 1000


class UnmountFailedError(QedError):
    """The mount has gone, but its process reported a failure, or did not report at all."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code  # type: ignore[misc]


def unmount_and_wait(path: str, seconds: float | None = None) -> None:
    """Unmount and wait until everything is durable, unlocked and closed.

    Nothing is ever killed: a process that takes long is writing.

    Args:
        path: The mountpoint.
        seconds: How long to wait for the process; None for as long as it takes.

    Raises:
        MountpointError: It is not a mount of ours, or it is in use.
        UnmountFailedError: The process failed at the end, or has not ended in time.
    """
    mountpoint = resolve(path)
    shown = printable(mountpoint)
    entry = find_mount(mountpoint)
    if entry is None:
        msg = f"{shown}: found no mount, expected one of qedfuse"
        raise MountpointError(msg)
    if entry.fstype != FUSE_TYPE:
        msg = f"{shown}: found a mount of type {printable(entry.fstype)}, expected {FUSE_TYPE}"
        raise MountpointError(msg)
    found = find_note(entry.device, entry.owner)
    process = None if found is None else _open_process(found[1])
    try:
        _take_away(mountpoint, entry)
        if found is None:
            msg = f"{shown}: unmounted, but found no note of its process: it may still be writing"
            raise UnmountFailedError(msg)
        if process is not None and not _ended(process, seconds):
            msg = f"{shown}: unmounted, but process {found[1].pid} has not ended in {seconds:g} s"
            raise UnmountFailedError(msg)
    finally:
        if process is not None:
            os.close(process)
    _report(shown, entry, found[0])


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
        now = find_mount(mountpoint)
        if now is not None and now.device == entry.device:
            raise


def _open_process(note: MountNote) -> int | None:
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


def _ended(process: int, seconds: float | None) -> bool:
    """Wait for the end of a process."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * _MILLISECONDS))


def _report(shown: str, entry: MountEntry, path: Path) -> None:
    """Tell what the process left behind: nothing if all went well.

    Raises:
        UnmountFailedError: It left a note.
    """
    note = read_note(path, entry.owner)
    if note is None:
        return
    with contextlib.suppress(OSError):
        path.unlink()
    if note.failure is not None:
        msg = f"{shown}: unmounted, but its process failed: {printable(note.failure)}"
        raise UnmountFailedError(msg, note.exit_code)
    msg = f"{shown}: unmounted, but its process had ended without closing the images cleanly"
    raise UnmountFailedError(msg)
