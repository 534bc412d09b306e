"""A lock that lets one qedfuse at a time mount on a mountpoint, and the mount it has made.

Between the check that nothing is mounted on a mountpoint and the mount itself, another
qedfuse could mount there, and one disk would cover the other.  So each qedfuse locks the
mountpoint, checks it, mounts, and unlocks it.

The lock is a socket bound to an abstract name (unix(7)) that contains the mountpoint's
device and inode.  The name is the same for all users and for every path to the mountpoint,
it leaves no file behind, and the kernel drops it with the process.  Abstract names belong to
a network namespace, and any user can bind one.  Therefore the wait for a lock is limited, and
the mount table decides in the end: a mount that covers another one of qedfuse is undone.
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

from qedfuse.errors import FuseError
from qedfuse.mount.system.mountpoint import in_use
from qedfuse.mount.system.mounttable import FUSE_TYPE, MountEntry, read_mounts
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

_MAX_WAIT_SECONDS: Final = 5.0
"""Longest wait for the lock; its holder mounts, which takes some milliseconds."""
_RETRY_SECONDS: Final = 0.01


def mountpoint_lock_name(mountpoint: str) -> bytes | None:
    """Return the name of the lock for a path; None if the path does not exist.

    Call it before anything is mounted there: the root of a mount has another inode.
    """
    try:
        found = os.stat(mountpoint)  # noqa: PTH116
    except OSError:
        return None  # the check of the mountpoint reports the reason
    return b"\0qedfuse/mountpoint/%d:%d" % (found.st_dev, found.st_ino)


@asynccontextmanager
async def mountpoint_locked(name: bytes | None) -> AsyncIterator[None]:
    """Hold the lock ``name`` during the block.

    If ``name`` is None, or another process holds the lock for more than 5 seconds, the block
    runs without it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        with trio.move_on_after(_MAX_WAIT_SECONDS):
            # The kernel does not report that a name is free, so there is nothing to wait for.
            while name is not None and not _try_bind(lock, name):  # noqa: ASYNC110
                await trio.sleep(_RETRY_SECONDS)
        yield


def _try_bind(lock: socket.socket, name: bytes) -> bool:
    """Bind a socket to a name; return False if another process has the name."""
    try:
        lock.bind(name)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def find_new_mount(mountpoint: str, before: Iterable[MountEntry], connection: int) -> MountEntry:
    """Find the mount that the caller has made on a path.

    Args:
        mountpoint: The path.
        before: The mount table before the mount.
        connection: The descriptor of the connection to the kernel.

    Raises:
        FuseError: There is none.
    """
    old = {entry.mount_id for entry in before}
    device = _device(connection)
    found = None
    for entry in read_mounts():
        is_new = entry.path == mountpoint and entry.mount_id not in old
        if is_new and entry.fstype == FUSE_TYPE and device in (None, entry.device):
            found = entry
    if found is None:
        msg = f"{printable(mountpoint)}: found no mount after mounting"
        raise FuseError(msg)
    return found


def _device(connection: int) -> str | None:
    """Return the device number of a connection's mount; None before Linux 6.11."""
    text = Path(f"/proc/self/fdinfo/{connection}").read_bytes()
    found = re.search(rb"^fuse_connection:\t([0-9]+)$", text, re.MULTILINE)
    return f"0:{int(found[1])}" if found else None


def refuse_to_cover(mount: MountEntry) -> None:
    """Refuse a mount that lies on another one of qedfuse.

    Raises:
        MountpointError: It does.
    """
    for entry in read_mounts():
        if (
            entry.mount_id == mount.parent_id
            and entry.fstype == FUSE_TYPE
            and entry.path == mount.path
        ):
            raise in_use(mount.path)
