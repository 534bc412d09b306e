"""The place of the mount: is it fit, and may we mount there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Final

from qedfuse.errors import MountpointError, PrivilegeError, proc_missing
from qedfuse.mount.system.mounttable import FUSE_TYPE, find_mount
from qedfuse.text import printable

FUSE_DEVICE: Final = "/dev/fuse"
FUSE_CONF: Final = "/etc/fuse.conf"
_KERNEL_TREES: Final = ("/proc", "/sys")
_NEEDED: Final = (FUSE_DEVICE, *_KERNEL_TREES)
"""What the server looks up while it serves, so that no mount of its own may cover it.  A
mount on / would not even be seen, and unmounting / makes the system's root read-only."""
_LIBFUSE_NEEDS: Final = ("/bin/mount", "/lib64", "/etc/ld.so.cache", "/run/mount/utab")
"""What libfuse needs after the kernel has mounted and before the server serves: from 3.17 on
it runs mount(8), and waits for it, to bring the table of mount options up to date."""
_MAX_LINKS: Final = 40
"""As many links in a row as the kernel follows (MAXSYMLINKS)."""
_SYSTEM_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


def resolve(mountpoint: str) -> str:
    """Make a path absolute and free of links, as the mount table has it."""
    return os.path.realpath(mountpoint)


def resolve_mounted(path: str) -> str:
    """Resolve a path without asking what is mounted on it, whose server may not answer.

    Only the directories that lead to it are asked.  A path that is no mountpoint is returned
    as far as it can be resolved.
    """
    for _ in range(_MAX_LINKS):
        directory, name = os.path.split(path.rstrip("/"))
        if name in ("", ".", ".."):
            return resolve(path)
        path = os.path.join(os.path.realpath(directory), name)  # noqa: PTH118
        if find_mount(path) is not None:
            return path
        try:
            target = os.readlink(path)  # noqa: PTH115
        except OSError:
            return path
        path = os.path.join(os.path.dirname(path), target)  # noqa: PTH118, PTH120
    return path


def is_below(path: str, mountpoint: str) -> bool:
    """Tell whether a path leads through a mountpoint; both absolute and free of links."""
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _c_library() -> list[str]:
    """Return the path of the C library, beside which programs of the system find theirs.

    Raises:
        HostError: /proc is not mounted.
    """
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")
    except FileNotFoundError as error:
        raise proc_missing() from error
    # 7f5c1a000000-7f5c1a026000 r--p 00000000 fe:00 131  /usr/lib/x86_64-linux-gnu/libc.so.6
    names = (line.split(maxsplit=5)[-1] for line in maps if line)
    found = (name for name in names if re.search(r"/(libc[.-]|ld-musl-)[^/]*so[^/]*$", name))
    return list(found)[:1]


def check_mountpoint(mountpoint: str, disks: int) -> bool:
    """Refuse a path that cannot carry the mount; tell whether it is a directory.

    A directory need not be empty, as for mount(8): what is in it is hidden meanwhile.

    Raises:
        MountpointError: It is missing, stale, in use by another qedfuse, of a wrong
            kind, a file for more than one disk, or a place that the server needs itself.
    """
    shown = printable(mountpoint)
    needed = (*_NEEDED, *map(os.path.realpath, _LIBFUSE_NEEDS), *_c_library())
    if any(is_below(path, mountpoint) for path in needed) or any(
        is_below(mountpoint, tree) for tree in _KERNEL_TREES
    ):
        msg = f"mountpoint {shown}: found a directory of the system, expected another one"
        raise MountpointError(msg)
    try:
        mode = os.stat(mountpoint).st_mode  # noqa: PTH116
    except FileNotFoundError:
        msg = f"mountpoint {shown}: found nothing, expected a directory or a regular file"
        raise MountpointError(msg) from None
    except OSError as error:
        raise _unusable(mountpoint, error) from error
    entry = find_mount(mountpoint)
    if entry is not None and entry.fstype == FUSE_TYPE:
        try:
            os.statvfs(mountpoint)  # unlike the attributes, this is never remembered
        except OSError as error:
            raise _unusable(mountpoint, error) from error
        raise in_use(mountpoint)
    if stat.S_ISDIR(mode):
        return True
    if not stat.S_ISREG(mode):
        msg = f"mountpoint {shown}: found a special file, expected a directory or a regular file"
        raise MountpointError(msg)
    if disks != 1:
        msg = f"mountpoint {shown}: found a file for {disks} disks, expected a directory"
        raise MountpointError(msg)
    return False


def in_use(mountpoint: str) -> MountpointError:
    """Make the error for a path on which another qedfuse has mounted."""
    shown = printable(mountpoint)
    return MountpointError(
        f"mountpoint {shown}: in use: found another qedfuse mount "
        f"(end it with: qedfuse umount {shown})"
    )


def _unusable(mountpoint: str, error: OSError) -> MountpointError:
    """Explain a mountpoint that cannot even be looked at."""
    shown = printable(mountpoint)
    if error.errno == errno.EACCES:
        entry = find_mount(mountpoint)
        if entry is not None and entry.fstype == FUSE_TYPE:  # another user's
            return in_use(mountpoint)
    if error.errno == errno.ENOTCONN:
        return MountpointError(
            f"mountpoint {shown}: found a stale mount: the process that served it has ended "
            f"(remove it with: fusermount3 -u {shown}, or as root: umount {shown})"
        )
    if error.errno == errno.ENOTDIR:
        return MountpointError(f"mountpoint {shown}: found a file in place of a directory")
    return MountpointError(f"mountpoint {shown}: {os.strerror(error.errno or 0)}")


def find_fusermount() -> str | None:
    """Find the program that mounts for ordinary users; mount(8) runs us with a reset PATH."""
    return shutil.which("fusermount3") or shutil.which("fusermount3", path=_SYSTEM_PATH)


def check_privileges(*, for_others: bool, user: int | None = None) -> None:
    """Refuse what the kernel or fusermount3 would refuse, in words that say what to do.

    Args:
        for_others: ``allow_other`` or ``allow_root`` is wanted.
        user: Who mounts; None for the caller.

    Raises:
        PrivilegeError: Something is missing.
    """
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        msg = f"{FUSE_DEVICE}: found nothing, expected the FUSE device (as root: modprobe fuse)"
        raise PrivilegeError(msg) from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        msg = f"{FUSE_DEVICE}: cannot open: {reason} (its users must be able to read and write it)"
        raise PrivilegeError(msg) from error
    if (os.getuid() if user is None else user) == 0:
        return
    if find_fusermount() is None:
        msg = "fusermount3: found nothing, expected the program from fuse3 (root needs none)"
        raise PrivilegeError(msg)
    if for_others and not _others_allowed():
        msg = (
            "options allow_other and allow_root: refused for ordinary users: expected a line "
            f"user_allow_other in {FUSE_CONF} (root can add it; losetup and mount(8) run as "
            "root and need it to see the disk)"
        )
        raise PrivilegeError(msg)


def _others_allowed() -> bool:
    """Read fusermount3's configuration as it does: the word alone on a line."""
    try:
        with Path(FUSE_CONF).open(encoding="utf-8", errors="replace") as conf:
            return any(line.strip() == "user_allow_other" for line in conf)
    except OSError:
        return False
