"""Mountpoints: resolving their paths, and refusing those that cannot carry a mount."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

from qedfuse.errors import MountpointError, proc_missing
from qedfuse.mount.system.mounttable import FUSE_TYPE, find_mount
from qedfuse.mount.system.privileges import FUSE_DEVICE
from qedfuse.text import printable

_KERNEL_TREES: Final = ("/proc", "/sys")
_SERVER_PATHS: Final = (FUSE_DEVICE, *_KERNEL_TREES)
"""Paths that the server looks up while it answers requests.

If its own mount covered one of these paths, the server would wait for its own reply.  A mount on /
would cover all of them.
"""
_LIBFUSE_PATHS: Final = ("/bin/mount", "/lib64", "/etc/ld.so.cache", "/run/mount/utab")
"""Paths that mount(8) needs to update /run/mount/utab, a table of mount options.

After the kernel has mounted, libfuse 3.17 and newer runs mount(8).  The server answers requests
only when mount(8) has ended.  If the mount covered one of these paths, mount(8) would wait for the
server, and the server for mount(8).
"""
_MAX_LINKS: Final = 40
"""Maximum number of symbolic links that the kernel follows in one path (MAXSYMLINKS)."""


def resolve(mountpoint: str) -> str:
    """Make a path absolute and free of symbolic links, as paths in the mount table are.

    The components of the path need not exist.
    """
    return os.path.realpath(mountpoint)


def resolve_mounted(path: str) -> str:
    """Resolve the path of a mountpoint as `resolve` does, without accessing the mount.

    The server of the mount may not answer, so only the directories that lead to the mountpoint are
    accessed.  Exception: for a path that ends in ``.`` or ``..`` the mount is accessed.

    If the path leads to no mountpoint, the result is the path, resolved as far as possible.

    Raises:
        HostError: /proc is not mounted.
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
    """Return whether ``path`` is ``mountpoint`` or lies below it.

    Both must be absolute and free of symbolic links.
    """
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def check_mountpoint(mountpoint: str, disks: int) -> bool:
    """Refuse a path that cannot carry a mount of ``disks`` disks.

    A directory need not be empty: the mount hides its content, as with mount(8).

    Args:
        mountpoint: The path, absolute and free of symbolic links.
        disks: The number of disks.

    Returns:
        True if the mountpoint is a directory, and False if it is a regular file.

    Raises:
        MountpointError: The path is missing or unsuitable, a mount of qedfuse is there, or the
            mount would cover a path that the system, the server or libfuse needs.
        HostError: /proc is not mounted.
    """
    shown = printable(mountpoint)
    needed_paths = (*_SERVER_PATHS, *map(os.path.realpath, _LIBFUSE_PATHS), *_c_library())
    if any(is_below(path, mountpoint) for path in needed_paths) or any(
        is_below(mountpoint, tree) for tree in _KERNEL_TREES
    ):
        msg = (
            f"mountpoint {shown}: found a system path that a mount must not cover, expected "
            "another path"
        )
        raise MountpointError(msg)
    try:
        mode = os.stat(mountpoint).st_mode  # noqa: PTH116
    except FileNotFoundError:
        msg = f"mountpoint {shown}: found nothing, expected a directory or a regular file"
        raise MountpointError(msg) from None
    except OSError as error:
        raise _inaccessible(mountpoint, error) from error
    check_not_mounted(mountpoint)
    if stat.S_ISDIR(mode):
        return True
    if not stat.S_ISREG(mode):
        msg = f"mountpoint {shown}: found a special file, expected a directory or a regular file"
        raise MountpointError(msg)
    if disks != 1:
        msg = f"mountpoint {shown}: found a file for {disks} disks, expected a directory"
        raise MountpointError(msg)
    return False


def check_not_mounted(mountpoint: str) -> None:
    """Refuse a path if the topmost mount on it is a mount of qedfuse.

    The call may wait for the server of that mount.

    Raises:
        MountpointError: The topmost mount is one of qedfuse, in use or stale.
        HostError: /proc is not mounted.
    """
    entry = find_mount(mountpoint)
    if entry is None or entry.fstype != FUSE_TYPE:
        return
    try:
        # statvfs(2) fails if the server of the mount has ended.  stat(2) might succeed, because
        # the kernel caches attributes.
        os.statvfs(mountpoint)
    except OSError as error:
        raise _inaccessible(mountpoint, error) from error
    raise in_use(mountpoint)


def in_use(mountpoint: str) -> MountpointError:
    """Return the error for a path on which another qedfuse has mounted."""
    shown = printable(mountpoint)
    return MountpointError(
        f"mountpoint {shown}: in use: found another qedfuse mount "
        f"(to end that mount: qedfuse umount {shown})"
    )


def _inaccessible(mountpoint: str, error: OSError) -> MountpointError:
    """Return the error for a mountpoint after a failure of stat(2) or statvfs(2)."""
    shown = printable(mountpoint)
    if error.errno == errno.EACCES:
        entry = find_mount(mountpoint)
        if entry is not None and entry.fstype == FUSE_TYPE:
            # The mount belongs to another user, and its options exclude the caller.
            return in_use(mountpoint)
    if error.errno == errno.ENOTCONN:
        return MountpointError(
            f"mountpoint {shown}: found a stale mount: the process that served it has ended "
            f"(to remove the mount: fusermount3 -u {shown}, or as root: umount {shown})"
        )
    if error.errno == errno.ENOTDIR:
        return MountpointError(f"mountpoint {shown}: found a file in place of a directory")
    return MountpointError(f"mountpoint {shown}: {os.strerror(error.errno or 0)}")


def _c_library() -> list[str]:
    """Return a list with the path of the C library; empty if the path is not found.

    The other libraries that mount(8) needs normally lie in the same directory, so a mount that
    covers one of them normally covers the C library as well.
    """
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")
    except FileNotFoundError as error:
        raise proc_missing() from error
    # 7f5c1a000000-7f5c1a026000 r--p 00000000 fe:00 131  /usr/lib/x86_64-linux-gnu/libc.so.6
    paths = (line.split(maxsplit=5)[-1] for line in maps if line)
    libraries = (path for path in paths if re.search(r"/(libc[.-]|ld-musl-)[^/]*so[^/]*$", path))
    return list(libraries)[:1]
