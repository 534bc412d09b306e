"""What a copy can be written to: a file that is being made, or something that is there already."""

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
"""Bytes that are written with one call.

The host takes memory for all of them at once.  In a virtual machine large pieces of memory
are those that went back to the machine below, which takes its time to find others.
"""


class Write(NamedTuple):
    """Parts of a piece, to be written one behind the other at a file offset."""

    offset: int
    parts: list[memoryview]


class ParallelTarget(ABC):
    """A file that is being made: a piece only needs a place, and may be written at any time.

    Attributes:
        unit: Bytes; pieces are searched for zeros in units of it.
        longest: Bytes that a piece may have.
        descriptor: The open file; negative if nothing is written.
        name: What it is called in messages.
    """

    block_size: int
    max_chunk_bytes: int
    descriptor: int
    name: str

    @abstractmethod
    def place(self, start: int, view: memoryview, data: Mask, hide: Mask) -> list[Write]:
        """Find a place for the next piece; what is in no piece is zeros, or as the base has it.

        Called in a worker thread, for one piece after the other.

        Args:
            start: Guest offset.
            view: The content.
            data: The units to be written.
            hide: The units that are zeros where the base has something else.

        Returns:
            What is to be written.

        Raises:
            UsageError: The disk is larger than the target can be.
        """

    @abstractmethod
    def finish(self, size: int) -> None:
        """Complete the file after all writes: a disk of ``size`` bytes.

        Raises:
            QedError: It cannot be done.
        """


class SequentialTarget(ABC):
    """Something that is there already, or a pipe: it takes the pieces one after the other.

    Attributes:
        unit: Bytes; pieces are searched for zeros in units of it.
    """

    block_size: int
    max_chunk_bytes = MAX_CHUNK_BYTES

    @abstractmethod
    async def take(self, start: int, view: memoryview, data: Mask) -> None:
        """Write the next piece; what was in none is zeros.

        Args:
            start: Guest offset.
            view: The content.
            data: The units that are not zeros.

        Raises:
            QedError: It cannot be done.
        """

    @abstractmethod
    async def complete(self, size: int) -> None:
        """Write the zeros after the last piece of ``size`` bytes; see to durability.

        Raises:
            QedError: It cannot be done.
        """


Target: TypeAlias = ParallelTarget | SequentialTarget


async def complete(target: Target, size: int) -> None:
    """Complete any target; what waits for the host's disk does so in a worker thread."""
    if isinstance(target, ParallelTarget):
        await trio.to_thread.run_sync(target.finish, size)
    else:
        await target.complete(size)


def write_all(descriptor: int, writes: list[Write], name: str) -> None:
    """Write every byte, however little the host takes at a time; for a worker thread.

    Raises:
        HostError: The host refused.
    """
    try:
        for offset, parts in writes:
            at = offset
            for portion in _portions(parts):
                count = os.pwritev(descriptor, portion, at)
                at += count
                if count < sum(map(len, portion)):
                    rest = memoryview(b"".join(portion))[count:]
                    while rest:
                        count = os.pwrite(descriptor, rest, at)
                        at += count
                        rest = rest[count:]
    except OSError as error:
        raise HostError.from_os(error, name, "write") from error


def _portions(parts: list[memoryview]) -> Iterator[list[memoryview]]:
    """Split and join buffers into lists of at most `_MAX_BYTES_PER_WRITE` bytes."""
    portion: list[memoryview] = []
    room = _MAX_BYTES_PER_WRITE
    for part in parts:
        left = part
        while left:
            portion.append(left[:room])
            left = left[room:]
            room -= len(portion[-1])
            if not room:
                yield portion
                portion, room = [], _MAX_BYTES_PER_WRITE
    if portion:
        yield portion
