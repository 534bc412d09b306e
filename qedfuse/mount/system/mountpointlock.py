"""The lock that lets only one qedfuse at a time mount on a mountpoint.

Before mounting, each process of qedfuse checks that no mount of qedfuse lies on the mountpoint.
Without a lock, two processes could both check and then both mount, and the later mount would cover
the earlier one.  So each process locks the mountpoint, checks, mounts, and unlocks the mountpoint.

The lock is a socket bound to an abstract name (unix(7)) that contains the device number and the
inode of the mountpoint.  The name is the same for all users and for every path to the
mountpoint.  The lock leaves no file behind, and the kernel frees the lock when the process ends.

The lock does not exclude every other qedfuse:

- Each network namespace has its own abstract names, so a process in another network namespace can
  hold a lock of the same name.
- Any user can bind such a name and keep it.  So each process waits for the lock only for a limited
  time, and then mounts without the lock.

Therefore the caller must search the mount table after the mount (`find_new_mount`,
`refuse_to_cover`).  If the new mount covers another mount of qedfuse, the caller must undo the new
mount.
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
"""Maximum time to wait for the lock.  A process that holds the lock needs only some milliseconds
to mount."""
_RETRY_SECONDS: Final = 0.01
"""Time between two attempts to get the lock."""


def mountpoint_lock_name(mountpoint: str) -> bytes | None:
    """Return the name of the lock of a mountpoint; None if the path cannot be accessed.

    The caller must call this before the mount.  After the mount, stat(2) on the path would return
    the device number and the inode of the root of the mount.
    """
    try:
        status = os.stat(mountpoint)  # noqa: PTH116
    except OSError:
        return None  # `check_mountpoint` reports the reason
    return b"\0qedfuse/mountpoint/%d:%d" % (status.st_dev, status.st_ino)


@asynccontextmanager
async def mountpoint_locked(name: bytes | None) -> AsyncIterator[None]:
    """Hold the lock ``name`` during the block.

    The block runs without the lock if ``name`` is None, if another process still holds the lock
    after 5 seconds, or if the kernel refuses the lock for another reason.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        with trio.move_on_after(_MAX_WAIT_SECONDS):
            # The kernel does not notify a process when a name becomes free, so this task tries
            # again and again.
            while name is not None and not _try_bind(lock, name):  # noqa: ASYNC110
                await trio.sleep(_RETRY_SECONDS)
        yield


def _try_bind(lock: socket.socket, name: bytes) -> bool:
    """Bind a socket to a name; return False if another socket has the name.

    If bind(2) fails for any other reason, another attempt would fail as well.  So the result is
    True then, and the socket has no name.
    """
    try:
        lock.bind(name)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def find_new_mount(mountpoint: str, before: Iterable[MountEntry], connection: int) -> MountEntry:
    """Find the mount that the caller has made on a path.

    Recent kernels report the device number of the connection's file system, and this function
    returns the mount with this number.  On other kernels, this function returns the topmost new
    mount of qedfuse on the path, even if another process has made that mount.

    Args:
        mountpoint: The path, absolute and free of symbolic links.
        before: The mount table before the mount.
        connection: The descriptor of the connection to the kernel.

    Raises:
        FuseError: The mount table has no such mount.
        HostError: /proc is not mounted.
    """
    # The kernel reuses the id of a mount that has ended.  So the new mount can have an id that
    # ``before`` has for a mount on another path.  Therefore the paths are compared as well.
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
    """Return the device number of a connection's mount, ``MAJOR:MINOR``; None on older kernels.

    Raises:
        HostError: /proc is not mounted.
    """
    try:
        text = Path(f"/proc/self/fdinfo/{connection}").read_bytes()
    except FileNotFoundError as error:
        raise proc_missing() from error
    match = re.search(rb"^fuse_connection:\t([0-9]+)$", text, re.MULTILINE)
    return f"0:{int(match[1])}" if match else None


def refuse_to_cover(mount: MountEntry) -> None:
    """Refuse a mount of the caller that covers another mount of qedfuse.

    After an error the caller must unmount its mount.

    Raises:
        MountpointError: The mount lies on another mount of qedfuse on the same path.
        HostError: /proc is not mounted.
    """
    for entry in read_mounts():
        if (
            entry.mount_id == mount.parent_id
            and entry.fstype == FUSE_TYPE
            and entry.path == mount.path
        ):
            raise in_use(mount.path)
