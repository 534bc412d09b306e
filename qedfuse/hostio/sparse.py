"""Finding the holes of sparse files, for blocking code that does not load trio."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from qedfuse.ondisk.table import SLICE_BYTES, slice_start

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNSUPPORTED: Final = {errno.EINVAL, errno.EOPNOTSUPP}
"""Errors of SEEK_DATA and SEEK_HOLE for a file whose holes are not known."""


def seek(fd: int, offset: int, whence: int) -> int | None:
    """Return where the first data or hole at or past an offset begins (lseek(2)).

    Returns None if there is no data, or no hole, up to the end of the file.  If the kernel
    refuses the call, because the file is a block device or the file system does not record
    holes, the whole file counts as data.

    Args:
        fd: The file.
        offset: File offset in bytes.
        whence: ``os.SEEK_DATA`` or ``os.SEEK_HOLE``.

    Raises:
        OSError: The host refused.
    """
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno not in _UNSUPPORTED:
            raise
    size = os.lseek(fd, 0, os.SEEK_END)  # fstat(2) reports 0 for a block device
    return None if offset >= size else offset if whence == os.SEEK_DATA else size


def data_slices(fd: int, table: int, length: int) -> Iterator[int]:
    """Yield the file offsets of the slices of a table that hold data; skip its holes.

    `qedfuse.hostio.tablewalk.DataSlices` does the same for asynchronous code.

    Args:
        fd: The image.
        table: File offset of the table.
        length: The table's length in bytes.

    Raises:
        OSError: The host refused.
    """
    position, end = table, table + length
    while position < end:
        data = seek(fd, position, os.SEEK_DATA)
        if data is None or data >= end:
            return
        position = max(position, slice_start(table, data))
        yield position
        position += SLICE_BYTES
