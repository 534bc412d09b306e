"""The base that a commit writes to: finding it in the chain, and opening it for writing."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, cast

from qedfuse.disk.lookup.backing import closing_layers, open_bases
from qedfuse.disk.lookup.layer import RawLayer
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.errors import BackingError, ImageInUseError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.hostio.locking import LockMode
from qedfuse.text import printable
from qedfuse.tools.common.writabledisk import open_writable

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.options import OpenOptions
    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.hostio.posixfile import PosixFile

COPY_CHUNK_BYTES: Final = 1 << 20
"""Bytes that are read, and written, in one call."""


@dataclass(frozen=True, slots=True)
class BaseFile:
    """The file of a base, as it was found when the chain was read.

    Attributes:
        path: Its path.
        status: Its attributes, by which it is recognised when it is opened again.
        is_raw: Whether it is raw.
        depth: Number of images over it.
    """

    path: str
    status: os.stat_result
    is_raw: bool
    depth: int


class Base(Protocol):
    """A base that is open for writing."""

    @property
    def name(self) -> str:
        """Its file in messages, as printable text."""

    @property
    def size(self) -> int:
        """Size of its disk in bytes."""

    @property
    def free_clusters(self) -> int:
        """Number of clusters of its file that are known to be free."""

    async def grow(self, size: int) -> None:
        """Grow its disk to ``size`` bytes; what is added reads as zeros."""

    async def write(self, start: int, data: Buffer) -> None:
        """Write bytes at a guest offset."""

    async def zero(self, start: int, length: int) -> None:
        """Make a range read as zeros, without using space if the file allows that."""

    async def flush(self) -> None:
        """Make everything durable."""

    async def tidy(self) -> None:
        """Move the highest clusters into free ones and shorten the file, as the options allow."""


class _QedBase:
    """A base that is a QED image, which may have bases itself."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.name = disk.name

    @property
    def size(self) -> int:
        return self._disk.size

    @property
    def free_clusters(self) -> int:
        return self._disk.statistics().free_clusters or 0

    async def grow(self, size: int) -> None:
        await self._disk.resize(size)

    async def write(self, start: int, data: Buffer) -> None:
        await self._disk.write(start, data)

    async def zero(self, start: int, length: int) -> None:
        await self._disk.discard(start, length)

    async def flush(self) -> None:
        await self._disk.flush()

    async def tidy(self) -> None:
        await self._disk.autocompact()


class _RawBase:
    """A raw base."""

    def __init__(self, file: PosixFile) -> None:
        self._file = file
        self.name = file.name
        self.free_clusters = 0

    @property
    def size(self) -> int:
        return self._file.size()

    async def grow(self, size: int) -> None:
        await self._file.truncate(size)

    async def write(self, start: int, data: Buffer) -> None:
        await self._file.pwrite(start, data)

    async def zero(self, start: int, length: int) -> None:
        await self._file.punch((start, length))
        if self._file.can_punch:
            return
        # The host's file system does not support holes.
        zeros, end = bytes(min(COPY_CHUNK_BYTES, length)), start + length
        for at in range(start, end, COPY_CHUNK_BYTES):
            await self._file.pwrite(at, memoryview(zeros)[: end - at])

    async def flush(self) -> None:
        await self._file.datasync()

    async def tidy(self) -> None:
        pass


async def find_base(overlay: Disk, options: OpenOptions) -> BaseFile:
    """Return the file of an overlay's base, found by reading the chain once.

    Nothing stays locked: the base is opened again for writing.

    Raises:
        BackingError: The overlay has no base, or one that cannot be used.
        ImageInUseError: Another file has taken the overlay's name.
    """
    with open_image_file(overlay.path, None) as file:
        check_same(overlay.path, file.stat(), overlay.fstat())
        header = await read_header(file)
        if not header.has_backing:
            msg = f"{overlay.name}: backing file: found none, expected one to commit to"
            raise BackingError(msg)
        bases = await open_bases(
            overlay.path, file, header, replace(options, lock=False), make_store(1 << 20)
        )
    with closing_layers(bases):
        base = cast("PosixFile", bases[0].file)
        return BaseFile(base.path, base.stat(), isinstance(bases[0], RawLayer), 1)


@asynccontextmanager
async def open_base(base_file: BaseFile, options: OpenOptions) -> AsyncIterator[Base]:
    """Open a base for writing, by the same rules as when it was found.

    Args:
        base_file: The base.
        options: How the overlay is opened.

    Raises:
        BackingError: The chain below it cannot be used.
        ImageInUseError: Another program has it open.
    """
    if base_file.is_raw:
        lock = LockMode.WRITE if options.lock else None
        with open_image_file(base_file.path, lock, writable=True) as file:
            check_same(base_file.path, file.stat(), base_file.status)
            yield _RawBase(file)
        return
    policy = replace(options.backing, trusted=None)
    async with open_writable(base_file.path, replace(options, backing=policy)) as disk:
        check_same(base_file.path, disk.fstat(), base_file.status)
        yield _QedBase(disk)


def check_same(path: str, found: os.stat_result, expected: os.stat_result) -> None:
    """Refuse a file that is not the one that was found when the chain was read.

    The policy for bases was applied to the file that was found then.

    Args:
        path: The file.
        found: Attributes of the file that is open now.
        expected: Attributes of the file as it was found.

    Raises:
        ImageInUseError: They are not the same file.
    """
    if (found.st_dev, found.st_ino) != (expected.st_dev, expected.st_ino):
        msg = f"{printable(path)}: found another file than when the chain was read"
        raise ImageInUseError(msg)
