"""A mount namespace for each process that runs tests beside others.

A program that copies its mount namespace, such as a sandbox, holds all mounts that it sees until it
ends, and ``qedfuse umount`` waits for that.  So tests in parallel must not see each other's mounts.
They must not share the directory of mount records either: each mount removes what killed servers
left there, which another test may be about to look at.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

from qedfuse.mount.system.mounttable import FUSE_TYPE, read_mounts
from qedfuse.mount.system.recorddirectory import record_directories

_CLONE_NEWNS: Final = 0x0002_0000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x4_0000
_MNT_DETACH: Final = 2


def enter_own_namespace() -> bool:
    """Move this process to a mount namespace of its own, without the qedfuse mounts of others.

    The directory of root's mount records is empty in it.  Processes that this thread starts later
    inherit the namespace.  Returns False if the process may not do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.unshare(_CLONE_NEWNS):
        return False
    # In a chroot, "/" may be no mount; changes there propagate as they did before.
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    for entry in reversed(read_mounts()):
        if entry.fstype == FUSE_TYPE:
            libc.umount2(os.fsencode(entry.path), _MNT_DETACH)
    for directory in record_directories(0):
        directory.mkdir(mode=0o700, exist_ok=True)
        if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, b"mode=0700"):
            return False
    return True
