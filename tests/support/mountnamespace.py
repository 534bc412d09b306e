"""A mount namespace for each process that runs tests beside others.

A program that copies its mount namespace, such as a sandbox, holds all mounts that it sees until it
ends, and ``qedfuse umount`` waits for that.  So tests in parallel must not see each other's mounts.
They must not share the directory of mount records either: each mount removes what killed servers
left there, which another test may be about to look at.

A server in the background keeps its own mount namespace, and so its mount.  If the test process is
killed, no program outside could unmount, and the server would never end.  So a *guard* in the
namespace waits for the end of the test process and then detaches what is left.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from pathlib import Path
from typing import Final

from qedfuse.mount.system.mounttable import FUSE_TYPE, read_mounts
from qedfuse.mount.system.recorddirectory import record_directories

_CLONE_NEWNS: Final = 0x0002_0000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x4_0000
_MNT_DETACH: Final = 2
_TREE: Final = Path(__file__).parents[2]


def enter_own_namespace() -> bool:
    """Move this process to a mount namespace of its own, without the qedfuse mounts of others.

    The directory of root's mount records is empty in it.  Processes that this thread starts later
    inherit the namespace.  When this process ends, however that happens, its mounts are detached.
    Returns False if the process may not do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.unshare(_CLONE_NEWNS):
        return False
    # In a chroot, "/" may be no mount; changes there propagate as they did before.
    if libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    _detach_all()
    for directory in record_directories(0):
        directory.mkdir(mode=0o700, exist_ok=True)
        if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, b"mode=0700"):
            return False
    _start_guard()
    return True


def _start_guard() -> None:
    """Start the guard of this process, which does not wait for the guard's end."""
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", __name__, str(os.getpid())],
        {**os.environ, "PYTHONPATH": str(_TREE)},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
        ],
        setsid=True,  # Ctrl-C is for the test process
    )


def _detach_all() -> None:
    """Detach all mounts of qedfuse in the namespace of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    for entry in reversed(read_mounts()):
        if entry.fstype == FUSE_TYPE:
            libc.umount2(os.fsencode(entry.path), _MNT_DETACH)


def _guard(pid: int) -> None:
    """Wait for the end of the parent, the process ``pid``; then detach its mounts."""
    try:
        poll = select.poll()
        poll.register(os.pidfd_open(pid), select.POLLIN)
        while os.getppid() == pid and not poll.poll():
            pass
    except ProcessLookupError:  # the parent has ended and was waited for
        pass
    _detach_all()


if __name__ == "__main__":
    _guard(int(sys.argv[1]))
