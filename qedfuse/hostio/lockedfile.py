"""Opening a file with its locks: one place for everything that begins with a path.

The functions here block and need no trio, which the fast check, the fast map and
``qedimg info`` do not load; `qedfuse.hostio.imagefile` does the same for asynchronous code.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qedfuse.hostio.locking import lock_image
from qedfuse.hostio.regular import open_regular, status_of
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.header import parse_fitting_header
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.locking import LockMode
    from qedfuse.ondisk.header import Header


def open_locked(path: str, lock: LockMode | None, *, writable: bool = False) -> int:
    """Open a regular file and lock it; return its descriptor, which the caller closes.

    Closing it drops the locks.

    Args:
        path: The file.
        lock: What to lock it for; None does not lock it.
        writable: Whether to open it for writing as well.

    Raises:
        HostError: It cannot be opened or locked.
        ImageError: It is not a regular file.
        ImageInUseError: Another program holds a lock that excludes this one.
    """
    fd = open_regular(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        if lock is not None:
            lock_image(fd, lock, printable(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def locked_descriptor(path: str, lock: LockMode | None) -> Iterator[int]:
    """Open a regular file for reading and lock it; close it at the end of the block.

    Raises:
        QedError: As `open_locked`.
    """
    fd = open_locked(path, lock)
    try:
        yield fd
    finally:
        os.close(fd)


def read_header_of(fd: int, name: str) -> tuple[Header, int]:
    """Read and check the header of an image; return it and the file's length in bytes.

    Raises:
        ImageError: The file, called ``name`` in messages, is no QED image that this version
            can open.
        OSError: The host cannot read it.
    """
    size = status_of(fd, name).st_size
    return parse_fitting_header(os.pread(fd, HEADER_BYTES, 0), size, name), size
