"""The length of a cache entry's data file shows whether one opener uses the entry, or several.

An *opener* is an open `UnitFile`.  The data file is longer than the object by one byte while one
opener uses the entry, and by two bytes while several may use it.  So one lseek(2) shows whether
there are other openers.

If another program truncates the file, the file has neither of the two lengths, and its openers
notice this.  Later writes do not give the file one of these lengths again, because no opener writes
to the added bytes at its end.  Only a `join` that runs during the truncation can restore a valid
length.

Each opener holds a read lock on the first byte of the data file.  So the next opener finds that it
is not alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from typing import Final

ALONE_BYTES: Final = 1
"""How many bytes the file is longer than the object while one opener uses the entry."""
SHARED_BYTES: Final = 2
"""How many bytes the file is longer than the object while several openers may use the entry."""

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def has_length(length: int, size: int) -> bool:
    """Return whether a data file has a valid length, for an object of ``size`` bytes."""
    return length - size in {ALONE_BYTES, SHARED_BYTES}


def join(data_fd: int, lock_fd: int, size: int) -> None:
    """Become an opener of an entry, and set the length of its data file.

    Args:
        data_fd: The open data file.
        lock_fd: Another open file of the entry, locked (flock(2)) during the call, so that only one
            opener at a time sets the length.
        size: The size of the object in bytes.

    Raises:
        OSError: The file was truncated (EBADMSG), another opener holds the lock of ``lock_fd``
            (EWOULDBLOCK), or the host refused.
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
    """Lock the first byte; return whether another opener has locked it, or may have."""
    with suppress(OSError):
        lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK
    return True  # the locks failed (some file systems have none), so there may be other openers
