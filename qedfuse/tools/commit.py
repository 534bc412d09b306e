"""Writing what an overlay holds into its base.

The order makes an interruption harmless, at any moment:

1. The base grows, if the overlay is larger.  What is added reads as zeros, which is what
   the overlay shows past the end of a shorter base.
2. The overlay's data goes into the base.  Only ranges change that the overlay has itself,
   and so hides: over the base it reads as before, with none, some or all of this done.
3. The base is made durable.  From here on both hold the same where the overlay has
   anything.
4. Only then the overlay's entries become unallocated.  Each one that does uncovers a
   cluster of the base that reads the same, so it does not matter how many have done so,
   nor in what order.  The tables and the space go last.

The base reads differently as soon as the first byte has been written to it.  That is
what this is for, but other overlays over it are spoilt.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.backing import open_bases, read_backing_name, read_header
from qedfuse.disk.backingpath import backing_path
from qedfuse.disk.extents import Kind
from qedfuse.disk.layer import RawLayer
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.disk.tablecache import make_store
from qedfuse.errors import BackingError, ImageInUseError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.tools.ownextents import own_extents, pieces
from qedfuse.util.text import printable

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable

    from qedfuse.disk.disk import Disk
    from qedfuse.disk.extents import Extent
    from qedfuse.hostio.hostfile import Buffer

    Progress = Callable[[int, int], None]

PIECE: Final = 1 << 20
"""Bytes that are copied at a time."""


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What committing came to; all in bytes.

    Attributes:
        base: The base, fit to be printed.
        copied_bytes: How much data went into the base.
        zero_bytes: How much of the base became zeros.
        size_before: Size of the base's disk before.
        size: Size of the base's disk now.
        bytes_before: Length of the overlay's file before.
        bytes_after: Length of the overlay's file now.
        free_clusters: How many clusters of a QED base are free now, as far as known,
            because moving others there takes longer than the options allow; they take up
            no space on the host.
    """

    base: str
    copied_bytes: int
    zero_bytes: int
    size_before: int
    size: int
    bytes_before: int
    bytes_after: int
    free_clusters: int


async def commit(
    path: str,
    *,
    keep: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> CommitResult:
    """Write an overlay's own data into its base, and empty the overlay.

    Args:
        path: The overlay.
        keep: Leave the overlay as it is.
        options: How to open it and the bases; both files are locked for writing.
        progress: Called with how much is done of how much, in any unit.

    Raises:
        BackingError: The image has no base, or one that cannot be used.
        QedError: A file cannot be opened for writing, or the host refused.  The overlay
            reads over its base as it did before.
    """
    options = replace(options or OpenOptions(), force_share=False)
    # The base is about to change, so the overlay does without it.
    overlay_options = replace(options, writable=not keep)
    async with open_disk(
        path, overlay_options, inspector=inspect_image, with_bases=False
    ) as overlay:
        before = after = overlay.fstat().st_size
        async with _open_base(overlay, options) as base:
            old_size = base.size
            if overlay.size > base.size:
                await base.grow(overlay.size)
            copied, zeroes = await _copy(overlay, base, progress if keep else _half(progress))
            await base.flush()
            await base.tidy()
            if not keep:
                await overlay.empty(_half(progress, second=True))
                after = overlay.statistics().file_bytes
            size, name, free = base.size, base.name, base.free_clusters
        if progress is not None:
            progress(overlay.size, overlay.size)
    return CommitResult(name, copied, zeroes, old_size, size, before, after, free)


def _half(progress: Progress | None, *, second: bool = False) -> Progress | None:
    """Report what is half of the work; the other half is to empty the overlay."""
    if progress is None:
        return None
    return lambda done, whole: progress(done + (whole if second else 0), 2 * whole)


async def _copy(overlay: Disk, base: _Base, progress: Progress | None) -> tuple[int, int]:
    """Bring the base up to date; give how many bytes of data and of zeros that took."""
    copied = zeroes = 0
    for start in pieces(overlay):
        if progress is not None:
            progress(start, overlay.size)
        for extent in await own_extents(overlay, start):
            if extent.kind is Kind.DATA:
                await _copy_data(overlay, base, extent, progress)
                copied += extent.length
            elif extent.kind is Kind.ZERO:
                await base.zero(extent.start, extent.length)
                zeroes += extent.length
    return copied, zeroes


async def _copy_data(overlay: Disk, base: _Base, extent: Extent, progress: Progress | None) -> None:
    """Copy one extent."""
    for at in range(extent.start, extent.end, PIECE):
        length = min(PIECE, extent.end - at)
        await base.write(at, await overlay.read(at, length))
        if progress is not None:
            progress(at + length, overlay.size)


class _Base(Protocol):
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
        await self._disk.tidy()


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
        zeros, end = bytes(min(PIECE, length)), start + length
        for at in range(start, end, PIECE):
            await self._file.pwrite(at, memoryview(zeros)[: end - at])

    async def flush(self) -> None:
        await self._file.datasync()

    async def tidy(self) -> None:
        pass


@asynccontextmanager
async def _open_base(overlay: Disk, options: OpenOptions) -> AsyncIterator[_Base]:
    """Open the overlay's base for writing, by the rules for any base.

    Raises:
        BackingError: There is none, or the chain cannot be used.
        ImageInUseError: Somebody else has it open.
    """
    path, identity, raw = await _find_base(overlay, options)
    if raw:
        file = PosixFile.open(path, writable=True)
        try:
            if options.lock:
                lock_image(file.fd, LockMode.WRITE, file.name)
            _check_same(path, file.stat(), identity)
            yield _RawBase(file)
        finally:
            file.close()
        return
    policy = replace(options.backing, trusted=None)
    wanted = replace(options, writable=True, backing=policy)
    async with open_disk(path, wanted, inspector=inspect_image) as disk:
        _check_same(path, disk.fstat(), identity)
        yield _QedBase(disk)


async def _find_base(overlay: Disk, options: OpenOptions) -> tuple[str, os.stat_result, bool]:
    """Find the base by reading the chain once: where it is, which file, and whether it is raw.

    Nothing is locked: what is found is opened again for writing.
    """
    file = PosixFile.open(overlay.path)
    try:
        _check_same(overlay.path, file.stat(), overlay.fstat())
        header = await read_header(file)
        if not header.has_backing:
            msg = f"{overlay.name}: backing file: found none, expected one to commit to"
            raise BackingError(msg)
        name = await read_backing_name(file, header)
        bases = await open_bases(
            overlay.path, file, header, replace(options, lock=False), make_store(1 << 20)
        )
    finally:
        file.close()
    try:
        path = backing_path(overlay.path, name)
        return path, bases[0].file.stat(), isinstance(bases[0], RawLayer)
    finally:
        for layer in bases:
            layer.file.close()


def _check_same(path: str, found: os.stat_result, expected: os.stat_result) -> None:
    """Refuse a file that has taken the place of the one that the rules were applied to."""
    if (found.st_dev, found.st_ino) != (expected.st_dev, expected.st_ino):
        msg = f"{printable(path)}: found another file than a moment ago"
        raise ImageInUseError(msg)
