"""Whether one process has an entry of the cache open, or several: the length of its data shows it.

The data file is longer than the object by one byte while one opener uses the entry, and by two
bytes while several may use it.  Nothing writes these bytes.  So a reader knows with one lseek(2)
whether it is alone, and a file that was cut never has one of these lengths again because of a
write.

An opener holds a lock on the first byte of the data, by which the next one sees it.  The lock
belongs to the open file description (``F_OFD_SETLK``), as flock(2) does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from typing import Final

ALONE_BYTES: Final = 1
"""How many bytes the file is longer than the object while one opener uses it."""
SHARED_BYTES: Final = 2
"""The same while several openers may use it."""

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def has_length(length: int, size: int) -> bool:
    """Return whether ``length`` is that of the data for an object of ``size`` bytes, not cut."""
    return length - size in {ALONE_BYTES, SHARED_BYTES}


def join(data_fd: int, lock_fd: int, size: int) -> None:
    """Become a user of an entry, and set the length of its data.

    Args:
        data_fd: The data of an object of ``size`` bytes.
        lock_fd: Another file of the entry, by whose lock openers follow each other.
        size: The size of the object.

    Raises:
        OSError: The file was cut (EBADMSG), or another opener does not finish (EWOULDBLOCK).
    """
    fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        length = os.lseek(data_fd, 0, os.SEEK_END)
        if not has_length(length, size):
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        expected = size + (SHARED_BYTES if _has_others(data_fd) else ALONE_BYTES)
        if length != expected:
            os.ftruncate(data_fd, expected)
    finally:
        fcntl.flock(lock_fd, fcntl.LOCK_UN)


def _has_others(fd: int) -> bool:
    """Lock the first byte; return whether others have locked it, or may have."""
    with suppress(OSError):
        lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK
    return True  # the file system has no such locks
