"""The interfaces of the targets of a copy, and the writes to a file.

A *parallel* target is a new file, whose chunks several threads may write in any order.  A
*sequential* target is an existing file, an open image or a pipe.  Its chunks must be written one
after another, in the order of the disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import write_all
from qedfuse.tools.source.chunks import MAX_CHUNK_BYTES
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.tools.common.blocks import Mask

_MAX_BYTES_PER_WRITE: Final = 1 << 18
"""Maximum number of bytes in one pwritev(2).

The kernel allocates page cache for a whole call, in large blocks.  In a virtual machine that has
returned such blocks to the hypervisor, getting them back is slow.
"""


class Write(NamedTuple):
    """Buffers to write one after another, beginning at file offset ``offset`` (bytes)."""

    offset: int
    buffers: list[memoryview]


class ParallelTarget(ABC):
    """A new file.

    File offsets are assigned in the order of the disk.  The writes may be performed in any order.

    Attributes:
        block_size: Bytes in a block, which is stored as data, as zeros, or not at all.
        max_chunk_bytes: Maximum length of a chunk of several blocks, which crosses no multiple of
            this length.  If blocks are longer than this, each block is one chunk.
        descriptor: The open file; negative if nothing is written, as in a measurement.
        name: Name of the file in messages.
    """

    block_size: int
    max_chunk_bytes: int
    descriptor: int
    name: str

    @abstractmethod
    def assign_offsets(self, start: int, view: memoryview, data: Mask, zeros: Mask) -> list[Write]:
        """Assign file offsets to the next chunk, and return the writes that store the chunk.

        The caller must make the calls one after another, in the order of the disk, but may make
        them in different threads.  A block in no chunk, or in neither mask, is not stored: it reads
        as the base, or as zeros without a base.

        Args:
            start: Guest offset of the chunk.
            view: Content of the chunk.
            data: Mask of the blocks to store as data.
            zeros: Mask of the blocks to store as zeros over other content of the base.

        Raises:
            UsageError: The disk is larger than the target can be.
        """

    @abstractmethod
    def finish(self, size: int) -> None:
        """Give the file its metadata and length for a disk of ``size`` bytes; may block.

        The caller must have performed all writes.  Nothing is made durable.

        Raises:
            QedError: The file cannot be completed.
        """


class SequentialTarget(ABC):
    """An existing file, an open image or a pipe, which is written chunk after chunk.

    Attributes:
        block_size: Bytes in a block, which is stored as data or as zeros.
        max_chunk_bytes: Maximum length of a chunk of several blocks, which crosses no multiple of
            this length.  If blocks are longer than this, each block is one chunk.
    """

    block_size: int
    max_chunk_bytes = MAX_CHUNK_BYTES

    @abstractmethod
    async def write_chunk(self, start: int, view: memoryview, data: Mask) -> None:
        """Write zeros from the end of the previous chunk up to ``start``, then write this chunk.

        The zeros before the first chunk begin at guest offset 0.  The chunks must come in the order
        of the disk.

        Args:
            start: Guest offset of the chunk.
            view: Content of the chunk.
            data: Mask of the blocks to write as data; the other blocks are zeros.

        Raises:
            BrokenPipeError: The target is a pipe whose reading end is closed.
            QedError: The chunk cannot be written.
        """

    @abstractmethod
    async def finish(self, size: int) -> None:
        """Write zeros from the end of the last chunk up to ``size``, the end of the disk.

        An image is made durable.  So is a file or device, unless the target was made with
        ``durable=False`` (`ExistingRawTarget`).

        Raises:
            BrokenPipeError: The target is a pipe whose reading end is closed.
            QedError: The target cannot be completed.
        """


Target: TypeAlias = ParallelTarget | SequentialTarget


async def finish_target(target: Target, size: int) -> None:
    """Call `finish` of a target of either kind; a call that blocks is made in a worker thread.

    Raises:
        BrokenPipeError: The target is a pipe whose reading end is closed.
        QedError: The target cannot be completed.
    """
    if isinstance(target, ParallelTarget):
        await run_in_thread(target.finish, size)
    else:
        await target.finish(size)


def perform_writes(descriptor: int, writes: list[Write], name: str) -> None:
    """Perform writes completely, with as many system calls as needed; blocks the thread.

    Raises:
        HostError: A system call failed.
    """
    try:
        for offset, buffers in writes:
            at = offset
            for vector in _vectors(buffers):
                write_all(descriptor, at, tuple(vector))
                at += sum(map(len, vector))
    except OSError as error:
        raise HostError.from_os(error, name, "write") from error


def _vectors(buffers: list[memoryview]) -> Iterator[list[memoryview]]:
    """Yield the bytes as vectors of `_MAX_BYTES_PER_WRITE`; the last may be shorter."""
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
