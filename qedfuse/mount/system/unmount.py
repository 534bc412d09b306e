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

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


class BusyError(MountpointError):
    """The mount is in use: by a loop device, an open file or a working directory."""


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount; with ``lazy``, detach the mount even while it is in use (MNT_DETACH).

    The call blocks while the kernel sends its dirty pages to the process that serves the
    mount.  Therefore that process must call it in a worker thread, never in its event loop.

    Raises:
        BusyError: The mount is in use.
        PrivilegeError: It is another user's.
        FuseError: It cannot be unmounted for another reason.
    """
    if os.geteuid() == 0:
        _unmount_by_syscall(mountpoint, lazy=lazy)
    else:
        unmount_by_fusermount(mountpoint, lazy=lazy)


def _unmount_by_syscall(mountpoint: str, *, lazy: bool) -> None:
    """Unmount with umount2(2), which needs CAP_SYS_ADMIN."""
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        number = ctypes.get_errno()
        raise _error(mountpoint, number, os.strerror(number))


def unmount_by_fusermount(mountpoint: str, *, lazy: bool) -> None:
    """Unmount with the set-user-ID program fusermount3, for the user who mounted."""
    program = find_fusermount()
    if program is None:
        msg = f"{printable(mountpoint)}: cannot unmount: fusermount3 is not installed"
        raise PrivilegeError(msg)
    done = subprocess.run(  # noqa: S603  a program of the system, and a path
        [program, "-u", *(["-z"] if lazy else []), "--", mountpoint],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if done.returncode != 0:
        said = " ".join(os.fsdecode(done.stderr).split("\n")).strip()
        reason = said.replace(mountpoint, "")  # a path may contain any word
        number = errno.EBUSY if "busy" in reason else errno.EPERM if "permitted" in reason else 0
        raise _error(mountpoint, number, said or f"exit code {done.returncode}")


def _error(mountpoint: str, number: int, reason: str) -> QedError:
    """Return an error of the class by which callers decide what to do next."""
    kinds: dict[int, type[QedError]] = {errno.EBUSY: BusyError, errno.EPERM: PrivilegeError}
    found = "in use" if number == errno.EBUSY else printable(reason)
    return kinds.get(number, FuseError)(f"{printable(mountpoint)}: cannot unmount: {found}")


def sync_mount(mountpoint: str) -> None:
    """Have the kernel write back the dirty pages of a mount (syncfs(2)); blocks like `unmount`.

    Raises:
        OSError: The mount is dead, or a page could not be written back.
    """
    fd = os.open(mountpoint, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), mountpoint)
    finally:
        os.close(fd)
