"""Opening and locking the file of an image, and reading its header."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from qedfuse.hostio.locking import lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.header import parse_fitting_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.hostio.locking import LockMode
    from qedfuse.ondisk.header import Header


@contextmanager
def open_image_file(
    path: str, lock: LockMode | None, *, writable: bool = False
) -> Iterator[PosixFile]:
    """Open a regular file and lock it; close it at the end of the ``with`` block.

    The block can also close the file itself.

    Args:
        path: The file.
        lock: The mode in which to lock the file; None to take no lock.
        writable: Whether to open the file for writing as well.

    Raises:
        HostError: The file cannot be opened or locked.
        ImageError: The file is not a regular file.
        ImageInUseError: Another opener of the file holds a lock that conflicts with ``lock``.
    """
    file = PosixFile.open(path, writable=writable)
    try:
        if lock is not None:
            lock_image(file.fd, lock, file.name)
        yield file
    finally:
        file.close()


async def read_header(file: HostFile) -> Header:
    """Read and check the header of an image, also against the file's length.

    Raises:
        ImageError: The file is not a QED image that this version can open.
        HostError: The host cannot read the file.
    """
    data = bytes(await file.pread(0, HEADER_BYTES))
    return parse_fitting_header(data, file.size(), file.name)
