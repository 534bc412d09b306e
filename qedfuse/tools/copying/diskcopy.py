"""The copy itself: several pieces at once, each read, searched for zeros and written.

Reading and searching run in worker threads in any order.  Then each piece waits for its
turn, is given its place in the target and written; so the same disk gives the same file
each time.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.hostio.writebehind import WriteBehind
from qedfuse.tools.common.blocks import classify, masked_bytes
from qedfuse.tools.common.workerpool import WorkerPool
from qedfuse.tools.source.chunks import Chunker, read_segments
from qedfuse.tools.source.extentbatches import extent_batches
from qedfuse.tools.target.target import ParallelTarget, complete, write_all
from qedfuse.util.periodicprogress import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from qedfuse.tools.common.blocks import Bytes, Mask
    from qedfuse.tools.common.workerpool import Ticket
    from qedfuse.tools.source.chunks import Chunk
    from qedfuse.tools.source.source import Source
    from qedfuse.tools.target.target import SequentialTarget, Target

    Progress = Callable[[int, int], None]

_MAX_BUFFER_BYTES: Final = 64 << 20
"""Bytes that all pieces under way have together, however large the clusters are."""


class DiskCopy:
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
        sends: Literal["and waits", "on"] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Prepare to copy.

        Args:
            source: The disk.
            target: Where to.
            base: What the target shows of itself.
            sparse_size: Bytes; shorter runs of zeros are written as data, and all zeros if
                it is 0.
            sends: Have the host write a new target to its disk all the time: in
                expectation of an fsync, or as far as it can keep up.
            progress: Called with the bytes of the disk that are done, and how many it has.
        """
        self._source = source
        self._target = target
        self._base = base
        self._least = sparse_size
        self._sends = sends
        self._progress = progress
        self.data_bytes = 0
        self._done = 0
        self._length = max(target.max_chunk_bytes, target.block_size)

    async def run(self, streams: int) -> None:
        """Copy everything, with up to so many pieces under way at once.

        Raises:
            QedError: The source cannot be read, or the target be written.
        """
        source, target = self._source, self._target
        cutter = Chunker(
            source, target.block_size, self._length, base=self._base, full=not self._least
        )
        async with (
            periodic_progress(self._report if self._progress else None),
            aclosing(extent_batches(source, target.block_size, self._base)) as work,
        ):
            if isinstance(target, ParallelTarget):
                memory = self._length * (1 if self._base is None else 2)
                count = max(1, min(streams, _MAX_BUFFER_BYTES // memory))
                behind = None
                if self._sends and target.descriptor >= 0:
                    waits = self._sends == "and waits"
                    behind = WriteBehind(target.descriptor, target.name, waits=waits)
                crew = WorkerPool([self._hand(target, behind) for _ in range(count)])
                async for step in work:
                    await crew.work(cutter.cut(step))
            else:
                content, below = self._buffers()
                async for step in work:
                    for piece in cutter.cut(step):
                        await self._put(target, piece, content[: piece.length], below)
            await complete(target, source.size)
            self._done = source.size

    def _report(self) -> None:
        """Say how far it is."""
        if self._progress is not None:
            self._progress(self._done, self._source.size)

    def _buffers(self) -> tuple[Bytes, Bytes]:
        """Make the buffers for one stream.

        They are used for each piece again: fresh memory costs as much as copying into it.
        """
        below = self._length if self._base is not None else 0
        return np.empty(self._length, np.uint8), np.empty(below, np.uint8)

    def _hand(
        self, target: ParallelTarget, behind: WriteBehind | None
    ) -> Callable[[Chunk, Ticket], None]:
        """Give a function that copies one piece after the other, in a worker thread."""
        content, below = self._buffers()

        def copy(piece: Chunk, turn: Ticket) -> None:
            part = content[: piece.length]
            data, hide = self._look(piece, part, below)
            # The host lets one thread at a time write to a file.  Those that wait here do
            # so asleep, and leave the processor to those that read.
            turn.wait()
            writes = target.place(piece.start, part.data, data, hide)
            if target.descriptor >= 0:
                write_all(target.descriptor, writes, target.name)
            self._count(piece, data)
            turn.end()
            if behind is not None:
                for offset, parts in writes:
                    behind.wrote(offset, sum(map(len, parts)))

        return copy

    async def _put(
        self, target: SequentialTarget, piece: Chunk, content: Bytes, below: Bytes
    ) -> None:
        """Copy one piece to where most of the work is the target's, and in order."""
        data, _ = await trio.to_thread.run_sync(self._look, piece, content, below)
        await target.take(piece.start, content.data, data)
        self._count(piece, data)

    def _count(self, piece: Chunk, data: Mask) -> None:
        """Keep account of a piece that is done."""
        self.data_bytes += masked_bytes(data, self._target.block_size, piece.length)
        self._done = piece.start + piece.length

    def _look(self, piece: Chunk, content: Bytes, below: Bytes) -> tuple[Mask, Mask]:
        """Read a piece, in a worker thread; tell its data, and the zeros that hide a base."""
        block_size = self._target.block_size
        read_segments(content, piece.parts, self._source.name)
        if self._base is None:
            return classify(content, block_size, self._least)
        below = below[: piece.length]
        read_segments(below, piece.base, self._base.name)
        return classify(content, block_size, self._least, below)
