"""An empty QED image in memory, which makes a raw disk the base of a chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qedfuse.disk.creation.newheader import new_header
from qedfuse.hostio.readonlyfile import ReadOnlyFile
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    import os

    from qedfuse.hostio.hostfile import FileIdentity, HostFile


class EmptyImage(ReadOnlyFile):
    """An image without data clusters and without a backing name, to stand above a disk in a chain.

    The header states the size of the disk below.  The name and the attributes are those of the file
    below.

    Attributes:
        path: The path of the disk below.
        header: The header of the image.
    """

    def __init__(self, disk: HostFile) -> None:
        """Make an image to stand above ``disk``; `close` leaves ``disk`` open.

        Raises:
            UsageError: The disk is larger than an image can be.
        """
        super().__init__(disk.name)
        self.path = disk.path
        self.header = new_header(
            disk.size(), DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, None, backing_is_raw=False
        )
        self._disk = disk
        self._start = build_header(self.header)

    @property
    def identity(self) -> FileIdentity:
        """A value that differs from that of every other file, including that of the disk."""
        return ("empty", *self._disk.identity)

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read."""
        await trio.lowlevel.checkpoint()
        return self.read_blocking(offset, view)

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read."""
        length = max(0, min(len(view), self.size() - offset))
        view[:length] = self._start[offset : offset + length].ljust(length, b"\0")
        return length

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from a file offset; return False if the file ends too early to fill it."""
        return self.read_blocking(offset, view) == len(view)

    async def next_data(self, offset: int) -> int | None:
        """Return ``offset`` if it lies in the header, the only data; otherwise None."""
        await trio.lowlevel.checkpoint()
        return offset if offset < len(self._start) else None

    async def next_hole(self, offset: int) -> int | None:
        """Return the end of the header, or ``offset`` if higher; None at or past the file's end."""
        await trio.lowlevel.checkpoint()
        return max(offset, len(self._start)) if offset < self.size() else None

    def size(self) -> int:
        """Return the length of the image: a header and an L1 table."""
        return self.header.l1_end

    def stored_blocks(self) -> int:
        """Return the number of blocks of 512 bytes that the file of the disk takes up."""
        return self._disk.stored_blocks()

    def stat(self) -> os.stat_result:
        """Return the attributes of the file of the disk."""
        return self._disk.stat()

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system that holds the disk."""
        return self._disk.statvfs()

    def stop_fetching(self) -> None:
        """Do nothing: no read waits."""

    def close(self) -> None:
        """Do nothing."""
