"""The bytes of a disk as they are: in a new file, in a pipe, or over what a file or device has."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import fallocate
from qedfuse.tools.common.blocks import mask_ranges
from qedfuse.tools.source.chunks import MAX_CHUNK_BYTES
from qedfuse.tools.target.target import ParallelTarget, SequentialTarget, Write, write_all

if TYPE_CHECKING:
    from qedfuse.tools.common.blocks import Mask
    from qedfuse.tools.common.pipe import Stream

_BLOCK_BYTES: Final = 4096
_MIN_BLOCK_BYTES: Final = 512
_PUNCH_HOLE: Final = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZEROS: Final = memoryview(bytes(1 << 20))
_UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


class NewRawTarget(ParallelTarget):
    """A new file, with holes where there are zeros; it has no base to hide."""

    max_chunk_bytes = MAX_CHUNK_BYTES

    def __init__(self, descriptor: int, name: str, sparse_size: int = _BLOCK_BYTES) -> None:
        """Write to an open, empty file; to none if ``descriptor`` is negative."""
        self.descriptor = descriptor
        self.name = name
        self.block_size = (
            _BLOCK_BYTES if not _MIN_BLOCK_BYTES <= sparse_size < _BLOCK_BYTES else _MIN_BLOCK_BYTES
        )

    def place(self, start: int, view: memoryview, data: Mask, hide: Mask) -> list[Write]:  # noqa: ARG002
        """Write what is data where it belongs."""
        return [
            Write(
                start + first * self.block_size,
                [view[first * self.block_size : last * self.block_size]],
            )
            for first, last in mask_ranges(data)
        ]

    def finish(self, size: int) -> None:
        """Give the file its length."""
        if self.descriptor < 0:
            return
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise HostError.from_os(error, self.name, "truncate") from error


class StreamTarget(SequentialTarget):
    """A pipe, which takes every byte in order."""

    block_size = _BLOCK_BYTES

    def __init__(self, stream: Stream) -> None:
        """Write to an open stream."""
        self._stream = stream
        self._at = 0

    async def take(self, start: int, view: memoryview, data: Mask) -> None:  # noqa: ARG002
        """Write what comes before the piece, and the piece."""
        await self._skip(start)
        await self._stream.write(view)
        self._at = start + len(view)

    async def complete(self, size: int) -> None:
        """Write the zeros at the end of the disk."""
        await self._skip(size)

    async def _skip(self, end: int) -> None:
        """Write zeros up to an offset."""
        while self._at < end:
            zeros = _ZEROS[: end - self._at]
            await self._stream.write(zeros)
            self._at += len(zeros)


class ExistingRawTarget(SequentialTarget):
    """A file or a device that is there already; what is zeros is given back to the host."""

    block_size = _BLOCK_BYTES

    def __init__(self, descriptor: int, name: str, *, durable: bool = True) -> None:
        """Write over an open file that is at least as long as the disk."""
        self._durable = durable
        self.descriptor = descriptor
        self.name = name
        self._at = 0
        self._can_punch = True

    async def take(self, start: int, view: memoryview, data: Mask) -> None:
        """Clear what comes before the piece, and what is zeros in it; write the rest."""
        await self._clear(self._at, start)
        self._at = start + len(view)
        for first, last in mask_ranges(~data):
            end = min(last * self.block_size, len(view))
            await self._clear(start + first * self.block_size, start + end)
        writes = [
            Write(
                start + first * self.block_size,
                [view[first * self.block_size : last * self.block_size]],
            )
            for first, last in mask_ranges(data)
        ]
        await trio.to_thread.run_sync(write_all, self.descriptor, writes, self.name)

    async def complete(self, size: int) -> None:
        """Clear the rest of the disk, and have everything on the host's disk."""
        await self._clear(self._at, size)
        if not self._durable:
            return
        try:
            await trio.to_thread.run_sync(os.fsync, self.descriptor)
        except OSError as error:
            raise HostError.from_os(error, self.name, "fsync") from error

    async def _clear(self, start: int, end: int) -> None:
        """Make a range read as zeros."""
        if start < end:
            try:
                await trio.to_thread.run_sync(self._clear_in_thread, start, end)
            except OSError as error:
                raise HostError.from_os(error, self.name, "write") from error

    def _clear_in_thread(self, start: int, end: int) -> None:
        """Punch a hole, or write zeros where that cannot be done."""
        if self._can_punch:
            try:
                fallocate(self.descriptor, _PUNCH_HOLE, start, end - start)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._can_punch = False
            else:
                return
        while start < end:
            start += os.pwrite(self.descriptor, _ZEROS[: end - start], start)
