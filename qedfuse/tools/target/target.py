"""The interfaces of what a copy is written to, and writing to a new file.

A *parallel* target is a new file: several threads may write its chunks in any order.  A
*sequential* target is an existing file, an open image or a pipe: it takes chunk after chunk.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import trio

from qedfuse.errors import HostError
from qedfuse.tools.source.chunks import MAX_CHUNK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.tools.common.blocks import Mask

_MAX_BYTES_PER_WRITE: Final = 1 << 18
"""Bytes in one pwritev(2).

The host allocates page cache for all of them together.  In a virtual machine, large
contiguous memory is what was returned to the hypervisor, which is slow to provide it again.
"""


class Write(NamedTuple):
    """Buffers to write one after another, beginning at a file offset."""

    offset: int
    buffers: list[memoryview]


class ParallelTarget(ABC):
    """A new file.  Offsets are assigned chunk by chunk, in order; writing needs no order.

    Attributes:
        block_size: Bytes; chunks are searched for zeros in blocks of this size.
        max_chunk_bytes: Bytes that a chunk may have.
        descriptor: The open file; negative if nothing is written, as in a measurement.
        name: Its name in messages.
    """

    block_size: int
    max_chunk_bytes: int
    descriptor: int
    name: str

    @abstractmethod
    def assign_offsets(self, start: int, view: memoryview, data: Mask, zeros: Mask) -> list[Write]:
        """Assign file offsets to the next chunk, and return the writes that store it.

        Called in worker threads, for one chunk at a time and in the order of the disk.  What
        is in no chunk reads as zeros, or as the base.

        Args:
            start: Guest offset.
            view: Content of the chunk.
            data: Blocks to store as data.
            zeros: Blocks to store as zeros, because the base has something else there.

        Raises:
            UsageError: The disk is larger than the target can be.
        """

    @abstractmethod
    def finish(self, size: int) -> None:
        """Complete the file after all writes, for a disk of ``size`` bytes; may block.

        Raises:
            QedError: The file cannot be completed.
        """


class SequentialTarget(ABC):
    """An existing file, an open image or a pipe, which is written chunk after chunk.

    Attributes:
        block_size: Bytes; chunks are searched for zeros in blocks of this size.
        max_chunk_bytes: Bytes that a chunk may have.
    """

    block_size: int
    max_chunk_bytes = MAX_CHUNK_BYTES

    @abstractmethod
    async def write_chunk(self, start: int, view: memoryview, data: Mask) -> None:
        """Write zeros from the end of the chunk before up to the next one, and then that.

        Args:
            start: Guest offset.
            view: Content of the chunk.
            data: Blocks that are not zeros.

        Raises:
            QedError: It cannot be written.
        """

    @abstractmethod
    async def finish(self, size: int) -> None:
        """Write zeros from the last chunk up to ``size`` bytes, and make all durable if wanted.

        Raises:
            QedError: The target cannot be completed.
        """


Target: TypeAlias = ParallelTarget | SequentialTarget


async def finish_target(target: Target, size: int) -> None:
    """Complete either kind of target; calls that block are made in a worker thread."""
    if isinstance(target, ParallelTarget):
        await trio.to_thread.run_sync(target.finish, size)
    else:
        await target.finish(size)


def perform_writes(descriptor: int, writes: list[Write], name: str) -> None:
    """Write all bytes of some writes, with as many calls as needed; for a worker thread.

    Raises:
        HostError: The host refused.
    """
    try:
        for offset, buffers in writes:
            at = offset
            for vector in _vectors(buffers):
                count = os.pwritev(descriptor, vector, at)
                at += count
                if count < sum(map(len, vector)):
                    rest = memoryview(b"".join(vector))[count:]
                    while rest:
                        count = os.pwrite(descriptor, rest, at)
                        at += count
                        rest = rest[count:]
    except OSError as error:
        raise HostError.from_os(error, name, "write") from error


def _vectors(buffers: list[memoryview]) -> Iterator[list[memoryview]]:
    """Split and gather buffers into vectors of `_MAX_BYTES_PER_WRITE` bytes, except the last."""
    vector: list[memoryview] = []
    available = _MAX_BYTES_PER_WRITE
    for buffer in buffers:
        left = buffer
        while left:
            vector.append(left[:available])
            left = left[available:]
            available -= len(vector[-1])
            if not available:
                yield vector
                vector, available = [], _MAX_BYTES_PER_WRITE
    if vector:
        yield vector
