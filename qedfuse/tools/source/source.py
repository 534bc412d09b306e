"""A disk that is only read: a QED image with its chain, a raw file, or a block device."""

from __future__ import annotations

import os
import stat
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.regular import identity_of, length_of, open_raw, status_of
from qedfuse.hostio.sparse import seek
from qedfuse.hostio.systemcalls import read_all
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import probe_format

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from qedfuse.hostio.hostfile import FileIdentity
    from qedfuse.tools.common.formatprobe import FormatChoice, ImageFormat


_MAX_EXTENTS_PER_CALL: Final = 1 << 14
"""`RawSource.extents` stops when it has found at least this many extents."""


class BlockingReader(Protocol):
    """An open file for worker threads, which may wait: the part of `ReadableFile` for them."""

    @property
    def identity(self) -> FileIdentity:
        """What distinguishes the file from all others; see `ReadableFile`."""

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only if the file ends earlier.  Several
        threads may call it concurrently.

        Raises:
            HostError: The file cannot be read.
        """


class Source(Protocol):
    """A disk to read from.

    Attributes:
        size: Bytes of the disk.
        format: ``raw`` or ``qed``.
        name: Name of the disk in messages, as printable text.
        path: Path of the file on the host.
        is_device: Whether the disk is a block device.
    """

    size: int
    format: ImageFormat
    name: str
    path: str
    is_device: bool

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return how a range is stored, as extents in order and without gaps.

        The extents end at the end of the disk at the latest.  They may cover only the beginning
        of the range, so that the list has a limited length.  The list is empty only if the
        range is empty, or begins at or past the end of the disk.

        An invalid table entry raises no error, but gives an extent of kind `Kind.BAD`.  The file
        offset and the depth of an extent are meaningful only for the kind `Kind.DATA`.

        Raises:
            HostError: The host cannot read a file.
        """

    def readers(self) -> Sequence[BlockingReader]:
        """Return the open files of all layers, by depth.

        The file offset of a data extent refers to the file at the extent's depth.
        """


class RawSource:
    """A raw file or block device, whose bytes are those of the disk."""

    format: ImageFormat = "raw"

    def __init__(self, fd: int, path: str) -> None:
        """Read a file that the caller has opened and closes."""
        self._fd = fd
        self.path = path
        self.name = printable(path)
        self.size = length_of(fd, self.name)
        self.is_device = not stat.S_ISREG(status_of(fd, self.name).st_mode)

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return the data and holes of a range, or of its beginning; see `Source.extents`."""
        await trio.lowlevel.checkpoint()
        end = min(start + length, self.size)
        result: list[Extent] = []
        at = start
        try:
            while at < end and len(result) < _MAX_EXTENTS_PER_CALL:
                data = self._seek(at, os.SEEK_DATA, end)
                if data > at:
                    result.append(Extent(Kind.ZERO, at, data - at))
                if data < end:
                    at = self._seek(data, os.SEEK_HOLE, end)
                    result.append(Extent(Kind.DATA, data, at - data, data))
                else:
                    at = end
        except OSError as error:
            raise HostError.from_os(error, self.name, "seek") from error
        return result

    def _seek(self, offset: int, whence: int, end: int) -> int:
        """Return the offset of the first data or hole at or past ``offset``, at most ``end``.

        The result is also ``end`` if the file has no such data or hole.
        """
        found = seek(self._fd, offset, whence)
        return end if found is None else min(found, end)

    def readers(self) -> Sequence[BlockingReader]:
        """Return the source itself, which is its only file."""
        return [self]

    @property
    def identity(self) -> FileIdentity:
        """The device and the inode of the file."""
        return identity_of(status_of(self._fd, self.name))

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Read from the file; see `BlockingReader.read_blocking`."""
        try:
            return read_all(self._fd, offset, view)
        except OSError as error:
            raise HostError.from_os(error, self.name, "read") from error


@asynccontextmanager
async def open_source(
    path: str,
    format: FormatChoice = "auto",  # noqa: A002  the term of qemu-img
    options: OpenOptions | None = None,
) -> AsyncIterator[Source]:
    """Open and lock a disk for reading; close it at the end of the ``async with`` block.

    A block device is not locked.

    Args:
        path: A QED image, or a regular file or block device with raw content.
        format: Format of the file; ``auto`` detects the format from the first bytes.
        options: How to open the file; ``writable`` is ignored.  None for the defaults.

    Raises:
        UsageError: The format is ``auto`` and the file is an image of a foreign format.
        QedError: The file or a base cannot be opened or locked, the header of one of them is
            invalid, or the backing policy refuses a base.
    """
    options = options or OpenOptions()
    if format == "auto":
        format = probe_format(path)  # noqa: A001
    if format == "qed":
        # Imported late, because loading these modules takes time, and a raw source does not
        # need them.
        from qedfuse.disk.opening import open_disk  # noqa: PLC0415  late, see above
        from qedfuse.tools.source.qedsource import QedSource  # noqa: PLC0415  late, see above

        async with open_disk(path, replace(options, writable=False)) as disk:
            yield QedSource(disk, path)
        return
    fd = open_raw(path, os.O_RDONLY)
    try:
        source = RawSource(fd, path)
        if options.lock and not source.is_device:
            lock_image(fd, LockMode.to_read(share=options.force_share), printable(path))
        yield source
    finally:
        os.close(fd)
