"""A disk that is only read: a QED image with its chain, a raw file, or a block device."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

import trio

from qedfuse.disk.extents import Extent, Kind, joined
from qedfuse.disk.layer import RawLayer
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.regular import open_raw
from qedfuse.tools.probing import probe
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Literal

    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.posixfile import PosixFile


class Source(Protocol):
    """A disk to read from.

    Attributes:
        size: Bytes of the disk.
        format: ``raw`` or ``qed``.
        name: What it is called in messages.
        path: Its name for the host.
    """

    size: int
    format: Literal["raw", "qed"]
    name: str
    path: str

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell how a range is stored, all of it and in order; clipped at the disk's end.

        Raises:
            HostError: The host cannot read a file.
        """

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read a range; short only where the disk ends.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """

    def descriptor(self, depth: int, /) -> int:
        """Give the file that the data extents of a ``depth`` lie in, open for reading."""

    def files(self) -> list[os.stat_result]:
        """Give the attributes of all files that the disk is made of."""


class RawSource:
    """The bytes of a file or a device as they are."""

    format: Literal["raw", "qed"] = "raw"

    def __init__(self, fd: int, path: str) -> None:
        """Take an open file."""
        self._fd = fd
        self.path = path
        self.name = printable(path)
        self.size = os.lseek(fd, 0, os.SEEK_END)

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell data from holes."""
        await trio.lowlevel.checkpoint()
        end = min(start + length, self.size)
        try:
            return data_and_holes(
                self._fd, start, end, Extent(Kind.DATA, start, end - start, start)
            )
        except OSError as error:
            raise HostError.from_os(error, self.name, "seek") from error

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read the bytes."""
        length = max(0, min(length, self.size - start))
        try:
            return await trio.to_thread.run_sync(self._read, start, length)
        except OSError as error:
            raise HostError.from_os(error, self.name, "read") from error

    def _read(self, start: int, length: int) -> bytes | bytearray:
        """Read in a worker thread, however little the host gives at a time."""
        data = os.pread(self._fd, length, start)
        if len(data) == length:
            return data
        parts = bytearray(data)
        while data and len(parts) < length:
            data = os.pread(self._fd, length - len(parts), start + len(parts))
            parts += data
        if len(parts) < length:
            msg = f"{self.name}: found {start + len(parts)} bytes, expected {self.size}"
            raise HostError(msg)
        return parts

    def descriptor(self, _depth: int, /) -> int:
        """Give the only file there is."""
        return self._fd

    def files(self) -> list[os.stat_result]:
        """Give the attributes of the file."""
        return [os.fstat(self._fd)]


class QedSource:
    """A QED image and its bases, locked for reading."""

    format: Literal["raw", "qed"] = "qed"

    def __init__(self, disk: Disk, path: str) -> None:
        """Read through an open disk."""
        self.disk = disk
        self.path = path
        self.name = printable(path)
        self.size = disk.size

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell how the chain stores a range, holes of raw bases included."""
        found = await self.disk.extents(start, length)
        raw = {
            depth
            for depth, layer in enumerate(self.disk.chain.layers)
            if isinstance(layer, RawLayer)
        }
        if not raw:
            return found
        result: list[Extent] = []
        try:
            for extent in found:
                if extent.kind is Kind.DATA and extent.depth in raw:
                    fd = self.descriptor(extent.depth)
                    result += data_and_holes(fd, extent.start, extent.end, extent)
                else:
                    result.append(extent)
        except OSError as error:
            raise HostError.from_os(error, self.name, "seek in a base") from error
        return joined(result)

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read through the chain."""
        return await self.disk.read(start, length)

    def descriptor(self, depth: int) -> int:
        """Give the file of a layer."""
        return cast("PosixFile", self.disk.chain.layers[depth].file).fd

    def files(self) -> list[os.stat_result]:
        """Give the attributes of the image and of its bases."""
        return [layer.file.stat() for layer in self.disk.chain.layers]


def data_and_holes(fd: int, start: int, end: int, whole: Extent) -> list[Extent]:
    """Cut an extent whose guest offsets are file offsets where the file has holes.

    Raises:
        OSError: The host cannot tell.
    """
    result: list[Extent] = []
    at = start
    while at < end:
        data = _seek(fd, at, os.SEEK_DATA, end)
        if data > at:
            result.append(whole._replace(kind=Kind.ZERO, start=at, length=data - at, file_offset=0))
        if data < end:
            at = _seek(fd, data, os.SEEK_HOLE, end)
            result.append(whole._replace(start=data, length=at - data, file_offset=data))
        else:
            at = end
    return result


def _seek(fd: int, at: int, whence: int, end: int) -> int:
    """Call lseek(2); what does not come before ``end`` comes there."""
    try:
        return min(os.lseek(fd, at, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        if error.errno in {errno.EINVAL, errno.EOPNOTSUPP}:  # a file that keeps no holes
            return at if whence == os.SEEK_DATA else end
        raise


@asynccontextmanager
async def open_source(
    path: str,
    format: Literal["auto", "raw", "qed"] = "auto",  # noqa: A002  the word of the trade
    options: OpenOptions | None = None,
) -> AsyncIterator[Source]:
    """Open a disk for reading; close it at the end of the ``async with`` block.

    Args:
        path: A QED image, or a regular file or block device with raw content.
        format: What it is; ``auto`` looks at its first bytes.
        options: How to open it; it is opened read-only in any case.

    Raises:
        UsageError: It is an image of another format.
        QedError: The image or a base cannot be opened, locked or trusted.
    """
    options = options or OpenOptions()
    if format == "auto":
        format = probe(path)  # noqa: A001
    if format == "qed":
        async with open_disk(path, replace(options, writable=False)) as disk:
            yield QedSource(disk, path)
        return
    fd = open_raw(path, os.O_RDONLY)
    try:
        if options.lock and stat.S_ISREG(os.fstat(fd).st_mode):
            mode = LockMode.SHARE if options.force_share else LockMode.READ
            lock_image(fd, mode, printable(path))
        yield RawSource(fd, path)
    finally:
        os.close(fd)
