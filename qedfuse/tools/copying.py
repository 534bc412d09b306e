"""The copy itself: several pieces at once, each read, searched for zeros and written.

Reading and searching run in worker threads in any order.  Then each piece waits for its
turn and is given its place in the target; so the same disk gives the same file each time.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np
import trio

from qedfuse.errors import HostError
from qedfuse.hostio.writeback import start_writeback
from qedfuse.tools.pieces import PIECE, fill, pieces, runs, same_units, zero_units
from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from numpy.typing import NDArray

    from qedfuse.tools.pieces import Mask, Piece
    from qedfuse.tools.sources import Source

    Progress = Callable[[int, int], None]
    Bytes = NDArray[np.uint8]

_MEMORY: Final = 64 << 20
"""Bytes that all pieces under way have together, however large the clusters are."""

_MOST_PARTS: Final = 1024  # IOV_MAX


class Write(NamedTuple):
    """Parts of a piece, to be written one behind the other at a file offset."""

    offset: int
    parts: list[memoryview]


class NewTarget(ABC):
    """A file that is being made: a piece only needs a place, and may be written at any time.

    Attributes:
        unit: Bytes; pieces are searched for zeros in units of it.
        longest: Bytes that a piece may have.
        descriptor: The open file; negative if nothing is written.
        name: What it is called in messages.
    """

    unit: int
    longest: int
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


class OldTarget(ABC):
    """Something that is there already, or a pipe: it takes the pieces one after the other.

    Attributes:
        unit: Bytes; pieces are searched for zeros in units of it.
    """

    unit: int
    longest = PIECE

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


Target: TypeAlias = NewTarget | OldTarget


class Copy:
    """A copy under way.

    Attributes:
        data_bytes: How much was written as data so far.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        *,
        base: Source | None = None,
        sparse_size: int = 4096,
        progress: Progress | None = None,
    ) -> None:
        """Prepare to copy.

        Args:
            source: The disk.
            target: Where to.
            base: What the target shows of itself.
            sparse_size: Bytes; shorter runs of zeros are written as data, and all zeros if
                it is 0.
            progress: Called with the bytes of the disk that are done, and how many it has.
        """
        self._source = source
        self._target = target
        self._base = base
        self._least = sparse_size
        self._progress = progress
        self.data_bytes = 0
        self._done = 0
        self._taking = trio.Lock()
        self._length = max(target.longest, target.unit)
        self._turn = threading.Event()
        self._turn.set()

    async def run(self, streams: int) -> None:
        """Copy everything, with up to so many pieces under way at once.

        Raises:
            QedError: The source cannot be read, or the target be written.
        """
        unit = self._target.unit
        work = pieces(self._source, unit, self._length, base=self._base, full=not self._least)
        memory = self._length * (1 if self._base is None else 2)
        streams = max(1, min(streams, _MEMORY // memory))
        if isinstance(self._target, OldTarget):
            streams = 1  # most of the work is the target's, and in order
        async with aclosing(work), open_scope() as nursery:
            for _ in range(streams):
                nursery.start_soon(self._stream, work)
        await complete(self._target, self._source.size)
        if self._progress is not None:
            self._progress(self._source.size, self._source.size)

    async def _stream(self, work: AsyncGenerator[Piece, None]) -> None:
        """Copy one piece after the other."""
        # Used again for each piece: fresh memory costs as much as copying into it.
        buffer = np.empty(self._length, np.uint8)
        below = np.empty(self._length if self._base is not None else 0, np.uint8)
        while True:
            async with self._taking:
                piece = await anext(work, None)
                if piece is None:
                    return
                before, self._turn = self._turn, threading.Event()
                turn = self._turn
            try:
                count = await self._one(piece, buffer[: piece.length], below, (before, turn))
            finally:
                # Nobody must wait for what was cancelled.
                turn.set()
            self.data_bytes += count * self._target.unit
            if self._progress is not None:
                self._done = max(self._done, piece.start + piece.length)
                self._progress(self._done, self._source.size)

    async def _one(
        self,
        piece: Piece,
        content: Bytes,
        below: Bytes,
        turns: tuple[threading.Event, threading.Event],
    ) -> int:
        """Copy one piece; give the units written."""
        if isinstance(self._target, NewTarget):
            return await trio.to_thread.run_sync(
                self._copy, self._target, piece, content, below, turns
            )
        data, _ = await trio.to_thread.run_sync(self._look, piece, content, below)
        await self._target.take(piece.start, content.data, data)
        return int(data.sum())

    def _copy(
        self,
        target: NewTarget,
        piece: Piece,
        content: Bytes,
        below: Bytes,
        turns: tuple[threading.Event, threading.Event],
    ) -> int:
        """Do all there is to do with a piece, in one worker thread; give the units written."""
        before, turn = turns
        try:
            data, hide = self._look(piece, content, below)
            # Pieces are begun in order, so the one before is under way.
            before.wait()
            writes = target.place(piece.start, content.data, data, hide)
        finally:
            turn.set()
        if target.descriptor >= 0:
            write_all(target.descriptor, writes, target.name)
            for offset, parts in writes:
                start_writeback(target.descriptor, offset, sum(map(len, parts)))
        return int(data.sum())

    def _look(self, piece: Piece, content: Bytes, below: Bytes) -> tuple[Mask, Mask]:
        """Read a piece, in a worker thread; tell its data, and the zeros that hide a base."""
        unit = self._target.unit
        fill(content, piece.parts, self._source.name)
        if self._base is None:
            return judge(content, unit, self._least)
        below = below[: piece.length]
        fill(below, piece.base, self._base.name)
        return judge(content, unit, self._least, below)


async def complete(target: Target, size: int) -> None:
    """Complete any target; what waits for the host's disk does so in a worker thread."""
    if isinstance(target, NewTarget):
        await trio.to_thread.run_sync(target.finish, size)
    else:
        await target.complete(size)


def judge(content: Bytes, unit: int, least: int, below: Bytes | None = None) -> tuple[Mask, Mask]:
    """Tell which units are data, and which are zeros that have to hide a base."""
    zero = zero_units(content, unit) if least else np.zeros(-(-len(content) // unit), np.bool_)
    if below is not None:
        differs = ~same_units(content, below, unit)
        return differs & ~zero, differs & zero
    if least > unit:
        for first, last in runs(zero):
            # A run that goes on in another piece may be long enough.
            if first > 0 and last < len(zero) and (last - first) * unit < least:
                zero[first:last] = False
    return ~zero, np.zeros(len(zero), np.bool_)


def write_all(descriptor: int, writes: list[Write], name: str) -> None:
    """Write every byte, however little the host takes at a time; for a worker thread.

    Raises:
        HostError: The host refused.
    """
    for offset, parts in writes:
        left, at = parts, offset
        while left:
            try:
                count = os.pwritev(descriptor, left[:_MOST_PARTS], at)
            except OSError as error:
                raise HostError.from_os(error, name, "write") from error
            at += count
            done = 0
            while done < len(left) and count >= len(left[done]):
                count -= len(left[done])
                done += 1
            left = left[done:]
            if count:
                left[0] = left[0][count:]
