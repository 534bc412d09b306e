"""What a user needs in order to mount: the FUSE device, fusermount3 and its configuration."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from qedfuse.errors import PrivilegeError

FUSE_DEVICE: Final = "/dev/fuse"
FUSE_CONF: Final = "/etc/fuse.conf"
_SYSTEM_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
"""The directories of the system's programs, in the form of the environment variable PATH."""


def find_fusermount() -> str | None:
    """Return the path of fusermount3, which mounts for ordinary users; None if it is missing.

    After PATH the directories of the system are searched: if mount(8) has started this process, its
    PATH is one of mount(8), and not the user's.
    """
    return shutil.which("fusermount3") or shutil.which("fusermount3", path=_SYSTEM_PATH)


def can_gain_privileges() -> bool:
    """Return whether a program that this process starts can gain privileges, as fusermount3 must.

    The result is also True if /proc is not mounted.
    """
    try:
        return "\nNoNewPrivs:\t1\n" not in Path("/proc/self/status").read_text("ascii", "replace")
    except OSError:
        return True


def check_privileges(*, for_others: bool, user: int | None = None) -> None:
    """Refuse a mount for which the user lacks a privilege or a program.

    The message of the error names the remedy.

    Args:
        for_others: Whether ``allow_other`` or ``allow_root`` is set.
        user: The user id of the user who mounts; None for the user of this process.

    Raises:
        PrivilegeError: The FUSE device cannot be opened.  Or, if the user is not root: fusermount3
            is missing, or ``for_others`` is True and fuse.conf does not permit the option.
    """
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        msg = f"{FUSE_DEVICE}: found nothing, expected the FUSE device (as root: modprobe fuse)"
        raise PrivilegeError(msg) from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        msg = (
            f"{FUSE_DEVICE}: cannot open: {reason} (users who mount must be able to read "
            "and write it)"
        )
        raise PrivilegeError(msg) from error
    if (os.getuid() if user is None else user) == 0:
        return
    if find_fusermount() is None:
        msg = (
            "fusermount3: found nothing, expected the program of the package fuse3, which ordinary "
            "users need in order to mount"
        )
        raise PrivilegeError(msg)
    if for_others and not _is_allow_other_permitted():
        msg = (
            "options allow_other and allow_root: refused for ordinary users: expected a line "
            f"user_allow_other in {FUSE_CONF} (root can add the line; losetup and mount(8) run "
            "as root, and cannot access the disk without one of these options)"
        )
        raise PrivilegeError(msg)


def _is_allow_other_permitted() -> bool:
    """Return whether fuse.conf has the line ``user_allow_other``; False if it cannot be read."""
    try:
        with Path(FUSE_CONF).open(encoding="utf-8", errors="replace") as conf:
            return any(line.partition("#")[0].strip() == "user_allow_other" for line in conf)
    except OSError:
        return False
