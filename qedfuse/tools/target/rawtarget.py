"""Raw targets: a new file, a pipe, and an existing file or block device."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from qedfuse.tools.common.blocks import mask_ranges
from qedfuse.tools.source.chunks import MAX_CHUNK_BYTES
from qedfuse.tools.target.target import ParallelTarget, SequentialTarget, Write, perform_writes
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from qedfuse.tools.common.blocks import Mask
    from qedfuse.tools.common.pipe import Stream

_BLOCK_BYTES: Final = 4096
_MIN_BLOCK_BYTES: Final = 512
_ZEROS: Final = memoryview(bytes(1 << 20))
"""The zeros of one write; a longer range of zeros takes several writes."""
_UNSUPPORTED: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}
"""Errors of fallocate(2) which mean that the host cannot punch holes in the file."""


class NewRawTarget(ParallelTarget):
    """A new raw file without a base.  Blocks that are not written stay holes."""

    max_chunk_bytes = MAX_CHUNK_BYTES

    def __init__(self, descriptor: int, name: str, sparse_size: int = _BLOCK_BYTES) -> None:
        """Prepare to write to an open, empty file.

        Args:
            descriptor: The file; negative to write nothing.
            name: Name of the file in messages.
            sparse_size: Minimum length in bytes of a run of zeros that the caller leaves out.  Here
                it only selects the block size: 512 for a length from 512 to 4095, otherwise 4096.
        """
        self.descriptor = descriptor
        self.name = name
        is_small = _MIN_BLOCK_BYTES <= sparse_size < _BLOCK_BYTES
        self.block_size = _MIN_BLOCK_BYTES if is_small else _BLOCK_BYTES

    def assign_offsets(
        self,
        start: int,
        view: memoryview,
        data: Mask,
        zeros: Mask,  # noqa: ARG002  a raw file has no base, so no zeros are written
    ) -> list[Write]:
        """Return the writes of the data; the file offset of each write is its guest offset."""
        return _data_writes(start, view, data, self.block_size)

    def finish(self, size: int) -> None:
        """Set the length of the file to ``size`` bytes; do nothing without a file.

        Raises:
            HostError: A system call failed.
        """
        if self.descriptor < 0:
            return
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise HostError.from_os(error, self.name, "truncate") from error


class StreamTarget(SequentialTarget):
    """A pipe, to which every byte of the disk is written in order, zeros included."""

    block_size = _BLOCK_BYTES

    def __init__(self, stream: Stream) -> None:
        """Prepare to write to an open stream."""
        self._stream = stream
        self._written_bytes = 0

    async def write_chunk(self, start: int, view: memoryview, data: Mask) -> None:  # noqa: ARG002
        """Write zeros up to ``start``, then all of the chunk, zeros included."""
        await self._write_zeros(start)
        await self._stream.write(view)
        self._written_bytes = start + len(view)

    async def finish(self, size: int) -> None:
        """Write zeros up to ``size``, the end of the disk."""
        await self._write_zeros(size)

    async def _write_zeros(self, end: int) -> None:
        """Write zeros from the end of the written bytes up to a guest offset."""
        while self._written_bytes < end:
            zeros = _ZEROS[: end - self._written_bytes]
            await self._stream.write(zeros)
            self._written_bytes += len(zeros)


class ExistingRawTarget(SequentialTarget):
    """An existing file or block device.

    Ranges of zeros are punched as holes, or written if the host cannot punch holes.
    """

    block_size = _BLOCK_BYTES

    def __init__(self, descriptor: int, name: str, *, durable: bool = True) -> None:
        """Prepare to write to an open file that is at least as long as the disk.

        Args:
            descriptor: The file.
            name: Name of the file in messages.
            durable: Whether `finish` makes the file durable with fsync(2).
        """
        self._durable = durable
        self.descriptor = descriptor
        self.name = name
        self._written_end = 0  # guest offset up to which the file is written or zeroed
        self._can_punch = True

    async def write_chunk(self, start: int, view: memoryview, data: Mask) -> None:
        """Zero the file from the end of the previous chunk up to ``start``; then write this chunk.

        Blocks of zeros in the chunk are punched as holes, if the host can punch holes.
        """
        await self._zero(self._written_end, start)
        self._written_end = start + len(view)
        for first, last in mask_ranges(~data):
            end = min(last * self.block_size, len(view))
            await self._zero(start + first * self.block_size, start + end)
        writes = _data_writes(start, view, data, self.block_size)
        await run_in_thread(perform_writes, self.descriptor, writes, self.name)

    async def finish(self, size: int) -> None:
        """Zero the file from the end of the last chunk up to ``size``; fsync(2) if ``durable``."""
        await self._zero(self._written_end, size)
        if not self._durable:
            return
        try:
            await run_in_thread(os.fsync, self.descriptor)
        except OSError as error:
            raise HostError.from_os(error, self.name, "fsync") from error

    async def _zero(self, start: int, end: int) -> None:
        """Make a range of the file read as zeros; do nothing if the range is empty."""
        if start < end:
            try:
                await run_in_thread(self._zero_blocking, start, end)
            except OSError as error:
                raise HostError.from_os(error, self.name, "write") from error

    def _zero_blocking(self, start: int, end: int) -> None:
        """Punch a hole, or write zeros if the host cannot punch; for a worker thread."""
        if self._can_punch:
            try:
                fallocate(self.descriptor, FALLOC_PUNCH_HOLE, start, end - start)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._can_punch = False
            else:
                return
        while start < end:
            start += os.pwrite(self.descriptor, _ZEROS[: end - start], start)


def _data_writes(start: int, view: memoryview, data: Mask, block_size: int) -> list[Write]:
    """Return the writes of the blocks in ``data``; the file offset of each is its guest offset."""
    return [
        Write(start + first * block_size, [view[first * block_size : last * block_size]])
        for first, last in mask_ranges(data)
    ]
