"""The base that an overlay is committed to, as something that can be written to."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.errors import ImageInUseError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.text import printable

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.options import OpenOptions
    from qedfuse.hostio.hostfile import Buffer

COPY_CHUNK_BYTES: Final = 1 << 20
"""Bytes that are copied at a time."""


@dataclass(frozen=True, slots=True)
class BaseFile:
    """Where a base is, and which file that was when the chain was looked at.

    Attributes:
        path: Its path.
        identity: Its attributes.
        is_raw: Whether it is raw.
        depth: How many images lie over it.
    """

    path: str
    identity: os.stat_result
    is_raw: bool
    depth: int


class Base(Protocol):
    """The base as something that can be written to."""

    @property
    def name(self) -> str:
        """The file, fit to be printed."""

    @property
    def size(self) -> int:
        """Bytes of its disk."""

    @property
    def free_clusters(self) -> int:
        """How many clusters of its file are free, as far as known."""

    async def grow(self, size: int) -> None:
        """Give it a larger size; what is added reads as zeros."""

    async def write(self, start: int, data: Buffer) -> None:
        """Write bytes."""

    async def zero(self, start: int, length: int) -> None:
        """Make a range read as zeros, and give its space up where that can be."""

    async def flush(self) -> None:
        """Make everything durable."""

    async def tidy(self) -> None:
        """Move what is in use to where something became free, as far as that is quick."""


class _QedBase:
    """A base that is an image itself, with bases of its own."""

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
    """A base whose bytes are the disk's."""

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
        # The host has no holes: what it does not know to be one is written over.
        zeros, end = bytes(min(COPY_CHUNK_BYTES, length)), start + length
        for at in range(start, end, COPY_CHUNK_BYTES):
            await self._file.pwrite(at, memoryview(zeros)[: end - at])

    async def flush(self) -> None:
        await self._file.datasync()

    async def tidy(self) -> None:
        pass


@asynccontextmanager
async def open_base(place: BaseFile, options: OpenOptions) -> AsyncIterator[Base]:
    """Open a base for writing, by the rules for any base.

    Raises:
        BackingError: The chain below it cannot be used.
        ImageInUseError: Another program has it open.
    """
    if place.is_raw:
        file = PosixFile.open(place.path, writable=True)
        try:
            if options.lock:
                lock_image(file.fd, LockMode.WRITE, file.name)
            check_same(place.path, file.stat(), place.identity)
            yield _RawBase(file)
        finally:
            file.close()
        return
    policy = replace(options.backing, trusted=None)
    wanted = replace(options, writable=True, backing=policy)
    async with open_disk(place.path, wanted, inspector=inspect_image) as disk:
        check_same(place.path, disk.fstat(), place.identity)
        yield _QedBase(disk)


def check_same(path: str, found: os.stat_result, expected: os.stat_result) -> None:
    """Refuse a file that has taken the place of the one that the rules were applied to.

    Raises:
        ImageInUseError: It has.
    """
    if (found.st_dev, found.st_ino) != (expected.st_dev, expected.st_ino):
        msg = f"{printable(path)}: found another file than a moment ago"
        raise ImageInUseError(msg)
