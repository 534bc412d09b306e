"""The lock that lets only one qedfuse at a time mount on a mountpoint.

Before mounting, each process checks that no mount of qedfuse lies on the mountpoint.  Without a
lock, two processes could both check and then both mount, and one mount would cover the other.

The lock is a socket bound to an abstract name (unix(7)) with the device number and the inode of the
mountpoint.  The name is the same for all users, and for all paths that lead to the mountpoint.  The
kernel frees the name when the process ends.

Each network namespace has its own abstract names, so processes in two of them can hold the lock
concurrently.  And any user can keep the name, so a process waits only for a limited time, and then
mounts without the lock.  Therefore the caller must search the mount table after the mount
(`find_new_mount`, `refuse_to_cover`), and undo a mount that covers another mount of qedfuse.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import FuseError, proc_missing
from qedfuse.mount.system.mountpoint import in_use
from qedfuse.mount.system.mounttable import FUSE_TYPE, MountEntry, read_mounts
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

_MAX_WAIT_SECONDS: Final = 5.0
"""Maximum time to wait for the lock; mounting takes only some milliseconds."""
_RETRY_SECONDS: Final = 0.01
"""Time between two attempts to get the lock."""


def mountpoint_lock_name(mountpoint: str) -> bytes | None:
    """Return the name of the lock of a mountpoint; None if the path cannot be accessed.

    This must be called before the mount.  Afterwards the path has the device number and the inode
    of the root of the mount.
    """
    try:
        status = os.stat(mountpoint)  # noqa: PTH116
    except OSError:
        return None  # `check_mountpoint` reports the reason
    return b"\0qedfuse/mountpoint/%d:%d" % (status.st_dev, status.st_ino)


@asynccontextmanager
async def mountpoint_locked(name: bytes | None) -> AsyncIterator[None]:
    """Hold the lock ``name`` during the block.

    The block runs without the lock if ``name`` is None, if another process holds the lock for 5
    seconds, or if the host refuses to make it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        with trio.move_on_after(_MAX_WAIT_SECONDS):
            # The kernel does not notify a process when a name becomes free.
            while name is not None and not _try_bind(lock, name):  # noqa: ASYNC110
                await trio.sleep(_RETRY_SECONDS)
        yield


def _try_bind(lock: socket.socket, name: bytes) -> bool:
    """Bind a socket to a name; return False if another socket has the name.

    After any other error, the result is True, because another attempt would fail as well.
    """
    try:
        lock.bind(name)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def find_new_mount(mountpoint: str, before: Iterable[MountEntry], connection: int) -> MountEntry:
    """Find the mount that the caller has made on a path.

    Recent kernels report the device number of the mount that belongs to a FUSE connection.  On
    other kernels the result is the topmost new mount of qedfuse, even if another process made it.

    Args:
        mountpoint: The path, absolute and free of symbolic links.
        before: The mount table before the mount.
        connection: The descriptor of the FUSE connection of the caller's mount.

    Raises:
        FuseError: The mount table has no such mount.
        HostError: /proc is not mounted.
    """
    # The kernel reuses the ids of mounts that have ended.  So the new mount may have the id of an
    # old one on another path, and the paths are compared as well.
    old = {(entry.mount_id, entry.path) for entry in before}
    device = _device(connection)
    new_mount = None
    for entry in read_mounts():
        if entry.path != mountpoint or entry.fstype != FUSE_TYPE:
            continue
        if entry.device == device or (device is None and (entry.mount_id, entry.path) not in old):
            new_mount = entry
    if new_mount is None:
        msg = f"{printable(mountpoint)}: found no mount after mounting"
        raise FuseError(msg)
    return new_mount


def _device(connection: int) -> str | None:
    """Return the device number of a connection's mount, ``MAJOR:MINOR``; None on older kernels."""
    try:
        text = Path(f"/proc/self/fdinfo/{connection}").read_bytes()
    except FileNotFoundError as error:
        raise proc_missing() from error
    match = re.search(rb"^fuse_connection:\t([0-9]+)$", text, re.MULTILINE)
    return f"0:{int(match[1])}" if match else None


def refuse_to_cover(mount: MountEntry) -> None:
    """Refuse a mount of the caller that covers another mount of qedfuse.

    Raises:
        MountpointError: The caller's mount lies on another one, so the caller must end its mount.
        HostError: /proc is not mounted.
    """
    for entry in read_mounts():
        if (
            entry.mount_id == mount.parent_id
            and entry.fstype == FUSE_TYPE
            and entry.path == mount.path
        ):
            raise in_use(mount.path)
