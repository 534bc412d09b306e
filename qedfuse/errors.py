"""The exceptions of qedfuse, in one tree.

    QedError                      EIO      32  any other failure
    ├── UsageError                EINVAL    1  invalid arguments, or arguments that conflict
    ├── ReadOnlyError             EROFS     1  the disk is read-only and cannot be changed
    ├── HostError                 (host's)  2  the host's file system or kernel refused
    │   ├── NoSpaceError          ENOSPC    2  the host is full, or a PastEndError
    │   │   └── PastEndError      ENOSPC    2  a write begins at or past the end of the disk
    │   ├── CacheError            (host's)  2  the cache for remote files cannot be used
    │   ├── RemoteError           EIO      22  a server cannot be reached, or does not serve a file
    │   │   │                     ENOENT   26  the server has no such file
    │   │   │                     EACCES   27  the server refuses access to it
    │   │   └── ObjectChangedError ESTALE  23  the file on the server has changed
    │   └── ForeignError          EIO      25  an image in another format of QEMU cannot be served
    ├── ImageError                EINVAL   12  the base of the errors about an image's content
    │   ├── NotQedError           EINVAL   12  no QED magic, or shorter than a header
    │   ├── HeaderError           EINVAL   12  a header field is out of its range
    │   ├── UnsupportedError      ENOTSUP  14  unknown incompatible feature bits
    │   ├── CorruptImageError     EIO      13  the tables contradict themselves or the file
    │   └── NeedsCheckError       EIO      15  the image must be checked first, and was not
    ├── ImageInUseError           EBUSY    16  the image is in use, or another process replaced it
    ├── BackingError              ENOENT   17  a backing file cannot be used
    │   └── BackingRefusedError   EPERM    17  ... because its name or the policy forbids it
    ├── MountpointError           EBUSY    18  the mountpoint is missing, busy, stale or unsuitable
    ├── PrivilegeError            EPERM    19  the user has no permission for the mount
    └── FuseError                 EIO      21  libfuse or the kernel's FUSE module failed

The columns are the class, the errno with which a request of a guest fails, the exit code of
``qedfuse``, and the cause.  ``str(error)`` is one line that can be printed unchanged, because the
names in it are escaped.
"""

from __future__ import annotations

import errno as errnos
import os
from typing import Self

from qedfuse.text import printable


class QedError(Exception):
    """The base of the errors that qedfuse reports to its users.

    Attributes:
        errno: The error number with which a request of a guest fails.
        exit_code: The exit code of ``qedfuse``.  ``qedimg`` replaces some codes by others.
    """

    errno: int = errnos.EIO
    exit_code: int = 32

    def again(self) -> Self:
        """Return a copy with the same attributes and no traceback.

        A stored error must be copied each time it is raised; otherwise tasks would mix their
        tracebacks.
        """
        copy = type(self).__new__(type(self), *self.args)
        copy.__dict__.update(self.__dict__)
        return copy

    def prefixed(self, text: str) -> Self:
        """Return a copy whose message begins with ``text``."""
        copy = self.again()
        copy.args = (f"{text}{self}",)
        return copy

    def renamed(self, old: str, new: str) -> Self:
        """Return a copy whose message has the name ``new`` of a file in place of ``old``."""
        copy = self.again()
        copy.args = (str(self).replace(old, new),)
        return copy

    def equals(self, other: QedError) -> bool:
        """Return whether ``other`` has the same class and the same message."""
        return type(self) is type(other) and self.args == other.args


class UsageError(QedError):
    """The arguments are invalid, or conflict with each other or with the image."""

    errno = errnos.EINVAL
    exit_code = 1


class ReadOnlyError(QedError):
    """The disk cannot be changed: it is open read-only, or a failure has made it read-only."""

    errno = errnos.EROFS
    exit_code = 1


class HostError(QedError):
    """The host's file system or kernel refused an operation, with the error number ``errno``."""

    exit_code = 2

    def __init__(self, message: str, errno: int = errnos.EIO) -> None:
        super().__init__(message)
        self.errno = errno

    @classmethod
    def from_os(cls, error: OSError, name: str, action: str) -> HostError:
        """Return the error for a failed ``action`` on the file ``name``.

        The result is a `NoSpaceError` if the host's disk or the user's quota is full.
        """
        number = error.errno or errnos.EIO
        message = f"{name}: {action}: {os.strerror(number)}"
        if number in (errnos.ENOSPC, errnos.EDQUOT):
            return NoSpaceError(message, number)
        return cls(message, number)


class NoSpaceError(HostError):
    """A write begins at or past the end of the disk (`PastEndError`), or the host is full.

    Also raised if the image file would become longer than a file can be.  If the user's quota on
    the host is full, ``errno`` can be EDQUOT instead of ENOSPC.
    """

    def __init__(self, message: str, errno: int = errnos.ENOSPC) -> None:
        super().__init__(message, errno)


class PastEndError(NoSpaceError):
    """A write begins at or past the end of the disk; the host is not full."""

    errno = errnos.ENOSPC


class CacheError(HostError):
    """The cache for remote files cannot be used, or has too little space."""


class RemoteError(HostError):
    """A server cannot be reached, refuses a request, or does not serve a file as needed.

    The error number also decides the exit code, because a script may want to wait for a server, to
    publish a file that is missing, or to ask for other credentials.

    Attributes:
        is_logged: Whether the failure was logged already, so that a request need not log it.
    """

    exit_code = 22
    is_logged: bool = False

    def __init__(self, message: str, errno: int = errnos.EIO) -> None:
        super().__init__(message, errno)
        self.exit_code = {errnos.ENOENT: 26, errnos.EACCES: 27}.get(errno, self.exit_code)


class ObjectChangedError(RemoteError):
    """The file on the server has changed since it was opened."""

    errno = errnos.ESTALE
    exit_code = 23

    def __init__(self, message: str, errno: int = errnos.ESTALE) -> None:
        super().__init__(message, errno)


class ForeignError(HostError):
    """An image in a format of QEMU other than QED and raw cannot be served.

    QEMU is missing, fails or refuses the image; or this program refuses the image.

    Attributes:
        is_logged: Whether the failure was logged already, so that a request need not log it.
    """

    exit_code = 25
    is_logged: bool = False


class ImageError(QedError):
    """The file is not a usable QED image."""

    errno = errnos.EINVAL
    exit_code = 12


class NotQedError(ImageError):
    """The file has no QED magic, or is too short to hold a header.

    Also raised if a directory contains no QED image.
    """


class HeaderError(ImageError):
    """A header field is out of its range.

    Attributes:
        field: The name of the field.
    """

    def __init__(self, name: str, field: str, found: object, expected: str) -> None:
        super().__init__(f"{name}: header field {field}: found {found}, expected {expected}")
        self.field = field


class UnsupportedError(ImageError):
    """The image uses incompatible features that this version does not know."""

    errno = errnos.ENOTSUP
    exit_code = 14


class CorruptImageError(ImageError):
    """A table contradicts itself, another table or the file, or the free list is invalid.

    Also raised if the file ends within the backing file name, or if a repair or its undo is
    refused because of what the image contains.
    """

    errno = errnos.EIO
    exit_code = 13


class NeedsCheckError(ImageError):
    """The image must be checked first, and was not.

    Either the caller has provided no check (`open_disk`), or the image is too large to be checked.
    """

    errno = errnos.EIO
    exit_code = 15


class ImageInUseError(QedError):
    """The image is already open in a conflicting way, in most cases in another program.

    Also raised if another process has replaced, changed or created a file during the operation.
    """

    errno = errnos.EBUSY
    exit_code = 16


class BackingError(QedError):
    """A backing file is missing, changed or of the wrong kind, or the chain is invalid.

    A chain is invalid if it is a loop, is too long, or lacks a file that the user named.  Also
    raised if a request needs a backing file, but the image was opened without it.
    """

    errno = errnos.ENOENT
    exit_code = 17


class BackingRefusedError(BackingError):
    """The backing file policy forbids the file, or its name cannot be used.

    A name with a NUL byte cannot be used, nor one with a protocol that qedfuse does not read.
    """

    errno = errnos.EPERM


class MountpointError(QedError):
    """The mountpoint is missing, unsuitable, busy or stale, or has no mount of qedfuse.

    Also raised if two disks would have the same name in a mountpoint, or if a name is too long.
    """

    errno = errnos.EBUSY
    exit_code = 18


class PrivilegeError(QedError):
    """The user has no permission to mount, remount or unmount.

    Also raised if the FUSE device or fusermount3 is missing.
    """

    errno = errnos.EPERM
    exit_code = 19


class FuseError(QedError):
    """libfuse or the kernel's FUSE module refused the mount or failed."""

    exit_code = 21


def cannot_open(path: str, error: OSError) -> HostError:
    """Return the error for a failed open(2) of a file that the user named."""
    return HostError.from_os(error, printable(path), "cannot open")


def proc_missing() -> HostError:
    """Return the error after a file below /proc/self was not found: /proc is not mounted."""
    return HostError(
        "/proc: found no proc file system, expected one (as root: mount -t proc proc /proc)",
        errnos.ENOENT,
    )
