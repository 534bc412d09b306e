"""Unmounting: umount2(2) for root, fusermount3 for every other user."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from typing import Final

from qedfuse.errors import FuseError, MountpointError, PrivilegeError, QedError
from qedfuse.mount.system.privileges import find_fusermount
from qedfuse.text import printable
from qedfuse.util.exitstatus import describe_exit

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


class BusyError(MountpointError):
    """A loop device, an open file or a working directory keeps the mount in use."""


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is mounted on a path.

    The call may block until the kernel has sent its dirty pages to the server of the mount.  So the
    server must call this function in a worker thread, never in its event loop.

    Args:
        mountpoint: The path, absolute and free of symbolic links.
        lazy: Whether to detach a mount that is in use (MNT_DETACH) instead of raising.

    Raises:
        BusyError: The mount is in use, and ``lazy`` is False.
        PrivilegeError: fusermount3 is missing, or the caller lacks the privilege to unmount.
        FuseError: The unmount failed for another reason, for example because nothing is mounted on
            the path.  Of another user's mount fusermount3 says that too.
    """
    if os.geteuid() == 0:
        _unmount_by_syscall(mountpoint, lazy=lazy)
    else:
        unmount_by_fusermount(mountpoint, lazy=lazy)


def _unmount_by_syscall(mountpoint: str, *, lazy: bool) -> None:
    """Unmount as `unmount` does, by umount2(2), which needs CAP_SYS_ADMIN."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        number = ctypes.get_errno()
        raise _error(mountpoint, number, os.strerror(number))


def unmount_by_fusermount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount as `unmount` does, by the set-user-ID program fusermount3.

    fusermount3 unmounts for a user only what the same user has mounted.
    """
    program = find_fusermount()
    if program is None:
        msg = f"{printable(mountpoint)}: cannot unmount: fusermount3 is not installed"
        raise PrivilegeError(msg)
    try:
        done = subprocess.run(  # noqa: S603  a program of the system, and a path
            [program, "-u", *(["-z"] if lazy else []), "--", mountpoint],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except OSError as error:  # for example too many processes, or no free descriptor
        reason = f"cannot start fusermount3: {error.strerror}"
        raise _error(mountpoint, 0, reason) from error
    if done.returncode != 0:
        printed = " ".join(os.fsdecode(done.stderr).split("\n")).strip()
        # fusermount3 reports the reason only in words.  The path is cut out first, because it may
        # contain one of the words that are searched for.
        words = printed.replace(mountpoint, "")
        number = errno.EBUSY if "busy" in words else errno.EPERM if "permitted" in words else 0
        reason = printed or f"fusermount3 {describe_exit(done.returncode)}"
        raise _error(mountpoint, number, reason)


def _error(mountpoint: str, number: int, reason: str) -> QedError:
    """Return the error for a failed unmount, in the class that matches the errno ``number``."""
    classes: dict[int, type[QedError]] = {errno.EBUSY: BusyError, errno.EPERM: PrivilegeError}
    shown = "in use" if number == errno.EBUSY else printable(reason)
    return classes.get(number, FuseError)(f"{printable(mountpoint)}: cannot unmount: {shown}")


def sync_mount(mountpoint: str) -> None:
    """Make the kernel begin to write back all dirty pages of a mount (syncfs(2)).

    This function can return before the writeback has ended.  The server of the mount must call it
    in a worker thread, like `unmount`.

    Raises:
        OSError: The mountpoint cannot be opened, the server of the mount has ended, or an earlier
            writeback of a page has failed.
    """
    fd = os.open(mountpoint, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), mountpoint)
    finally:
        os.close(fd)
