"""Copying a disk chunk by chunk; each chunk is read, searched for zeros and written.

For a parallel target, worker threads read and search chunks in any order.  Then each thread
waits for the turn of its chunk, assigns offsets in the target and writes the chunk.  Turns
follow the order of the disk, so the same disk always makes the same file.  For a sequential
target, one chunk is copied after the other.
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
from qedfuse.tools.target.target import ParallelTarget, finish_target, perform_writes
from qedfuse.util.backgroundtasks import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from qedfuse.tools.common.blocks import Bytes, Mask
    from qedfuse.tools.common.workerpool import Ticket
    from qedfuse.tools.source.chunks import Chunk
    from qedfuse.tools.source.source import Source
    from qedfuse.tools.target.target import SequentialTarget, Target
    from qedfuse.util.backgroundtasks import Progress

    WriteBehindMode = Literal["wait", "if fast", "off"]

DEFAULT_STREAMS: Final = 4
"""Most chunks in flight, unless the user chooses another number."""

_MAX_BUFFER_BYTES: Final = 64 << 20
"""Most bytes in all buffers together, unless a single chunk needs more.

Large clusters make large chunks, so fewer of them are in flight.
"""


class DiskCopy:
    """One copy of a disk.

    Attributes:
        data_bytes: Bytes written as data so far.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        *,
        base: Source | None = None,
        sparse_size: int = 4096,
        write_behind: WriteBehindMode = "off",
        progress: Progress | None = None,
    ) -> None:
        """Prepare a copy.

        Args:
            source: The disk to copy.
            target: The target to copy to.
            base: The disk that the target shows where nothing is written to the target.
            sparse_size: Bytes; a shorter run of zeros is written as data.  With 0 all zeros
                are written as data.
            write_behind: Whether a new file is written back to the host's disk during the
                copy.  ``wait``: always, and the copy waits for a slow disk, because an fsync
                follows.  ``if fast``: as long as the disk keeps up.  ``off``: never.
            progress: Called with the bytes of the disk copied so far, and the size of the
                disk.
        """
        self._source = source
        self._target = target
        self._base = base
        self._sparse_size = sparse_size
        self._write_behind = write_behind
        self._progress = progress
        self.data_bytes = 0
        self._done = 0
        self._chunk_bytes = max(target.max_chunk_bytes, target.block_size)

    async def run(self, streams: int) -> None:
        """Copy the whole disk and complete the target.

        Args:
            streams: Most chunks in flight.  A sequential target has only one in flight.

        Raises:
            BrokenPipeError: The target is a pipe whose reading end is closed.
            QedError: The source cannot be read, or the target cannot be written.
        """
        source, target = self._source, self._target
        chunker = Chunker(
            source,
            target.block_size,
            self._chunk_bytes,
            base=self._base,
            include_zeros=not self._sparse_size,
        )
        async with (
            periodic_progress(self._report_progress if self._progress else None),
            aclosing(extent_batches(source, target.block_size, self._base)) as batches,
        ):
            if isinstance(target, ParallelTarget):
                memory = self._chunk_bytes * (1 if self._base is None else 2)
                count = max(1, min(streams, _MAX_BUFFER_BYTES // memory))
                behind = None
                if self._write_behind != "off" and target.descriptor >= 0:
                    waits = self._write_behind == "wait"
                    behind = WriteBehind(target.descriptor, target.name, waits=waits)
                pool = WorkerPool([self._worker(target, behind) for _ in range(count)])
                async for batch in batches:
                    await pool.run(chunker.chunks(batch))
            else:
                content, base_content = self._buffers()
                async for batch in batches:
                    for chunk in chunker.chunks(batch):
                        await self._copy_in_order(
                            target, chunk, content[: chunk.length], base_content
                        )
            await finish_target(target, source.size)
            self._done = source.size

    def _report_progress(self) -> None:
        """Call the progress callback, if there is one."""
        if self._progress is not None:
            self._progress(self._done, self._source.size)

    def _buffers(self) -> tuple[Bytes, Bytes]:
        """Allocate two buffers for one worker: for the source, and for the base.

        The second is empty if there is no base.  The worker uses the same buffers for all
        its chunks, because the kernel needs as long to provide new memory as a copy into it
        takes.
        """
        base_bytes = self._chunk_bytes if self._base is not None else 0
        return np.empty(self._chunk_bytes, np.uint8), np.empty(base_bytes, np.uint8)

    def _worker(
        self, target: ParallelTarget, behind: WriteBehind | None
    ) -> Callable[[Chunk, Ticket], None]:
        """Return a function that copies one chunk in a worker thread, with its own buffers."""
        buffer, base_buffer = self._buffers()

        def copy(chunk: Chunk, ticket: Ticket) -> None:
            content = buffer[: chunk.length]
            data, zeros = self._read(chunk, content, base_buffer)
            # The kernel lets one thread at a time write to a file.  Threads that wait here
            # sleep instead of contending for its lock, so the processor is free for threads
            # that read.
            ticket.wait()
            writes = target.assign_offsets(chunk.start, content.data, data, zeros)
            if target.descriptor >= 0:
                perform_writes(target.descriptor, writes, target.name)
            self._count(chunk, data)
            ticket.finish()
            if behind is not None:
                for offset, buffers in writes:
                    behind.wrote(offset, sum(map(len, buffers)))

        return copy

    async def _copy_in_order(
        self, target: SequentialTarget, chunk: Chunk, content: Bytes, base_content: Bytes
    ) -> None:
        """Read one chunk and write it to a sequential target.

        Args:
            target: The target.
            chunk: The next chunk in the order of the disk.
            content: A buffer as long as the chunk.
            base_content: A buffer for the base, at least as long as the chunk if there is a
                base.
        """
        data, _ = await trio.to_thread.run_sync(self._read, chunk, content, base_content)
        await target.write_chunk(chunk.start, content.data, data)
        self._count(chunk, data)

    def _count(self, chunk: Chunk, data: Mask) -> None:
        """Add a copied chunk to `data_bytes` and to the progress; ``data`` marks its data."""
        self.data_bytes += masked_bytes(data, self._target.block_size, chunk.length)
        self._done = chunk.start + chunk.length

    def _read(self, chunk: Chunk, content: Bytes, base_content: Bytes) -> tuple[Mask, Mask]:
        """Read a chunk, and its range of the base, into buffers; for a worker thread.

        Returns:
            Two masks of blocks: to write as data, and to write as zeros that hide the base.
        """
        block_size = self._target.block_size
        read_segments(content, chunk.segments, self._source.name)
        if self._base is None:
            return classify(content, block_size, self._sparse_size)
        base_content = base_content[: chunk.length]
        read_segments(base_content, chunk.base_segments, self._base.name)
        return classify(content, block_size, self._sparse_size, base_content)
