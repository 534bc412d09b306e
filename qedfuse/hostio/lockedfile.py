"""Opening a file by its path and locking it, for code that is not asynchronous.

This module does not load trio, because its users must start quickly.
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


def open_locked(
    path: str, lock: LockMode | None, *, writable: bool = False, name: str | None = None
) -> int:
    """Open a regular file and lock it; return its descriptor, which the caller must close.

    Args:
        path: The file.
        lock: The mode in which to lock the file; None for no lock.
        writable: Whether to open the file for writing as well.
        name: Name of the file in messages; None for ``path``.

    Raises:
        HostError: The file cannot be opened or locked.
        ImageError: The file is not a regular file.
        ImageInUseError: Another opener of the file holds a lock that conflicts with ``lock``.
    """
    fd = open_regular(path, os.O_RDWR if writable else os.O_RDONLY, name=name)
    try:
        if lock is not None:
            lock_image(fd, lock, printable(name or path))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def locked_descriptor(path: str, lock: LockMode | None) -> Iterator[int]:
    """Open a regular file for reading and lock it; close it at the end of the ``with`` block.

    Args:
        path: The file.
        lock: The mode in which to lock the file; None for no lock.

    Raises:
        QedError: See `open_locked`.
    """
    fd = open_locked(path, lock)
    try:
        yield fd
    finally:
        os.close(fd)


def read_header_of(fd: int, name: str) -> tuple[Header, int]:
    """Read and check the header of an image; return it and the file's length in bytes.

    Raises:
        ImageError: The file is not a QED image that this version can open.
        HostError: The host cannot read the file's attributes.
        OSError: The host cannot read the file.
    """
    size = status_of(fd, name).st_size
    return parse_fitting_header(os.pread(fd, HEADER_BYTES, 0), size, name), size
