"""Blocking reads of an image, for `qedimg info` and other code that describes an image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from qedfuse.hostio.regular import allocated_bytes
from qedfuse.hostio.sparse import data_slices
from qedfuse.ondisk.table import SLICE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import ReadableFile


class ImageReader(Protocol):
    """Reads an image by calls that may block the thread.

    Attributes:
        size: Length of the file in bytes.
        disk_usage: Space in bytes that the file uses where it is stored; on a server, its length.
    """

    size: int
    disk_usage: int

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at a file offset; fewer only where the file ends.

        Raises:
            OSError: A system call failed.
            RemoteError: The server does not give the bytes.
        """

    def data_slices(self, table_offset: int, length: int) -> Iterator[int]:
        """Yield the file offsets of those slices of a table that may hold data.

        ``length`` is the length in bytes of the part of the table that is in the file.

        Raises:
            OSError: A system call failed.
        """


class DescriptorReader:
    """Reads a local file by its descriptor."""

    def __init__(self, fd: int) -> None:
        """Make a reader of an open file, which the caller must close later.

        Raises:
            OSError: A system call failed.
        """
        self._fd = fd
        status = os.fstat(fd)
        self.size = status.st_size
        self.disk_usage = allocated_bytes(status)

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of the file; see `ImageReader.read`."""
        return os.pread(self._fd, length, offset)

    def data_slices(self, table_offset: int, length: int) -> Iterator[int]:
        """Yield the slices that are not in a hole; see `qedfuse.hostio.sparse.data_slices`."""
        return data_slices(self._fd, table_offset, length)


class FileReader:
    """Reads a file without a descriptor, such as a URL; only a worker thread may call `read`."""

    def __init__(self, file: ReadableFile) -> None:
        """Make a reader of an open file, which the caller must close later."""
        self._file = file
        self.size = file.size()
        self.disk_usage = allocated_bytes(file.stat())

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of the file; see `ImageReader.read`."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        count = self._file.read_blocking(offset, memoryview(buffer))
        return bytes(buffer[:count])

    def data_slices(self, table_offset: int, length: int) -> Iterator[int]:
        """Yield all slices, because only an asynchronous call could find the holes."""
        return iter(range(table_offset, table_offset + max(0, length), SLICE_BYTES))
