"""Opening regular files and block devices, and refusing files of other kinds."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, ImageError, cannot_open, proc_missing
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import FileIdentity

KIND_NAMES: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}
"""Names of the kinds of files in messages, by S_IFMT of their mode."""

STAT_BLOCK_BYTES: Final = 512
"""The unit of ``st_blocks`` on every file system, see stat(2)."""


def open_regular(
    path: str, access: int, *, dir_fd: int | None = None, name: str | None = None
) -> int:
    """Open a regular file; return a descriptor, which the caller must close.

    A FIFO or a device is refused without being opened.

    Args:
        path: The file.
        access: ``os.O_RDONLY`` or ``os.O_RDWR``.
        dir_fd: Descriptor of the directory from which a relative path starts; None for the current
            directory.
        name: Name of the file in messages; None for ``path``.

    Raises:
        HostError: The file cannot be opened, or /proc is not mounted.
        ImageError: The file is not a regular file.
    """
    return _open(path, access, dir_fd, {stat.S_IFREG: "a regular file"}, name or path)


def open_raw(path: str, access: int) -> int:
    """Open a regular file or a block device; return a descriptor, which the caller must close.

    Raises:
        HostError: The file cannot be opened, or /proc is not mounted.
        ImageError: The file is of another kind.
    """
    expected = {stat.S_IFREG: "a file", stat.S_IFBLK: "a block device"}
    return _open(path, access, None, expected, path)


def _open(path: str, access: int, dir_fd: int | None, expected: dict[int, str], name: str) -> int:
    """Open a file of one of the kinds that are the keys of ``expected``; return a descriptor.

    The values of ``expected`` are the names of the kinds in messages, and ``name`` is the name of
    the file there.
    """
    flags = access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        # Opening a FIFO can wait, and opening a device can start the device.  So the kind of the
        # file is found out first: O_PATH gives a descriptor for fstat(2) without opening the file
        # itself.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        raise cannot_open(name, error) from error
    try:
        kind = stat.S_IFMT(os.fstat(handle).st_mode)
        if kind not in expected:
            found = KIND_NAMES.get(kind, "a special file")
            msg = f"{printable(name)}: found {found}, expected {' or '.join(expected.values())}"
            raise ImageError(msg)
        return os.open(f"/proc/self/fd/{handle}", flags)
    except FileNotFoundError as error:
        raise proc_missing() from error
    except OSError as error:
        raise cannot_open(name, error) from error
    finally:
        os.close(handle)


def status_of(file: int | str, name: str) -> os.stat_result:
    """Return the attributes of an open file or of a path (stat(2)); ``name`` is for messages.

    Raises:
        HostError: A system call failed.
    """
    try:
        return os.stat(file)  # noqa: PTH116  a name or a descriptor, not a Path
    except OSError as error:
        raise HostError.from_os(error, name, "stat") from error


def length_of(fd: int, name: str) -> int:
    """Return the length in bytes of an open file or block device; ``name`` is for messages.

    Moves the file position of the descriptor.

    Raises:
        HostError: A system call failed.
    """
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise HostError.from_os(error, name, "seek") from error


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return the device and the inode of a file."""
    return status.st_dev, status.st_ino


def allocated_bytes(status: os.stat_result) -> int:
    """Return the space in bytes that a file takes up on the host, from its attributes."""
    return status.st_blocks * STAT_BLOCK_BYTES
