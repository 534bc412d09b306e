"""Finding the data and the holes of sparse files by blocking calls, without loading trio."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.table import SLICE_BYTES, slice_start

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNSUPPORTED: Final = {errno.EINVAL, errno.EOPNOTSUPP}
"""Errors of lseek(2) if the file system does not record holes, or for a block device."""


def seek(fd: int, offset: int, whence: int) -> int | None:
    """Return the lowest offset, at or past ``offset``, of data or of a hole (lseek(2)).

    Returns None if the offset is at or past the end of the file, or if no data follows.  The end of
    the file counts as a hole.  A block device, and a file on a file system that does not record
    holes, count as data.  The call moves the file position of the descriptor.

    Args:
        fd: The file.
        offset: File offset in bytes.
        whence: ``os.SEEK_DATA`` or ``os.SEEK_HOLE``.

    Raises:
        OSError: A system call failed.
    """
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno not in _UNSUPPORTED:
            raise
    # The whole file counts as data, so its only hole is at its end.
    size = os.lseek(fd, 0, os.SEEK_END)  # fstat(2) reports 0 for a block device
    if offset >= size:
        return None
    return offset if whence == os.SEEK_DATA else size


def data_slices(fd: int, table_offset: int, length: int) -> Iterator[int]:
    """Yield the file offsets of those slices of a table that hold data; skip the holes.

    A slice is a part of `SLICE_BYTES` bytes.  For asynchronous code there is
    `qedfuse.hostio.tablewalk.DataSlices`.

    Args:
        fd: The image.
        table_offset: File offset of the table.
        length: Length of the table in bytes.

    Raises:
        OSError: A system call failed.
    """
    position, end = table_offset, table_offset + length
    while position < end:
        data = seek(fd, position, os.SEEK_DATA)
        if data is None or data >= end:
            return
        position = max(position, slice_start(table_offset, data))
        yield position
        position += SLICE_BYTES
