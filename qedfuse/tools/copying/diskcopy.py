"""Copying a disk chunk by chunk; each chunk is read, searched for zeros and written.

For a parallel target, worker threads read chunks in any order, but write them in the order of the
disk, so the same disk always makes the same file.  For a sequential target, one chunk is copied
after the other.
"""

from __future__ import annotations

import logging
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.hostio.writebehind import WriteBehind
from qedfuse.tools.common.blocks import classify, masked_bytes
from qedfuse.tools.common.workerpool import WorkerPool
from qedfuse.tools.source.chunks import Chunker, read_segments
from qedfuse.tools.source.extentbatches import extent_batches
from qedfuse.tools.target.target import ParallelTarget, finish_target, perform_writes
from qedfuse.util.backgroundtasks import periodic_progress
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal

    from qedfuse.tools.common.blocks import Bytes, Mask
    from qedfuse.tools.common.workerpool import Ticket
    from qedfuse.tools.source.chunks import Chunk
    from qedfuse.tools.source.source import Source
    from qedfuse.tools.target.target import SequentialTarget, Target
    from qedfuse.util.backgroundtasks import Progress

    WriteBehindMode = Literal["wait", "if fast", "off"]

_log = logging.getLogger(__name__)

DEFAULT_STREAMS: Final = 4
"""Default maximum number of chunks that are copied at the same time."""

_MAX_BUFFER_BYTES: Final = 64 << 20
"""Maximum size of all buffers together, unless the buffers for a single chunk need more."""


@contextmanager
def logging_partial_copy(name: str) -> Iterator[None]:
    """Log an error about the target ``name``, an existing disk, if the block raises.

    A new file gets its name only when it is complete, but after an interruption nothing in an
    existing disk shows that only a part of the copy is in it.
    """
    try:
        yield
    except BaseException:  # a cancellation included
        _log.error("%s: the copy ended early: old and new content may be mixed", name)
        raise


class DiskCopy:
    """One copy of a disk.

    Attributes:
        data_bytes: Bytes of the disk that were copied as data so far.  A measurement copies
            nothing, and counts what a copy would copy.
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
            base: The target's backing disk; only clusters that differ from it are written.  None if
                the target has no backing disk.
            sparse_size: A run of blocks of zeros is left out if it has at least this number of
                bytes, or lies at an end of a chunk.  With 0, zeros are written like other data.
                With a base all values except 0 mean the same: each cluster of zeros that differs
                from the base becomes a zero cluster.
            write_behind: When the data of a parallel target is written back to the host's disk.

                - ``wait``: during the copy, which waits if the disk is slow.  The wait costs no
                  time if an fsync follows, because the fsync would wait for the same data.
                - ``if fast``: during the copy, as long as the disk keeps up.
                - ``off``: when the kernel decides.
            progress: Called with the guest offset that the copy has reached, and the size of the
                disk.
        """
        self._source = source
        self._target = target
        self._base = base
        self._sparse_size = sparse_size
        self._write_behind = write_behind
        self._progress = progress
        self.data_bytes = 0
        self._copied_end = 0
        self._chunk_bytes = max(target.max_chunk_bytes, target.block_size)

    async def run(self, streams: int) -> None:
        """Copy the whole disk and complete the target.

        Args:
            streams: Maximum number of chunks that are copied at the same time to a parallel target.

        Raises:
            UsageError: The disk is larger than the target can be.
            CorruptImageError: A table entry of the source or of the base is bad.
            BrokenPipeError: The target is a pipe whose reading end is closed.
            QedError: The source or the base cannot be read, or the target cannot be written.
        """
        source, target = self._source, self._target
        chunker = Chunker(
            source,
            target.block_size,
            self._chunk_bytes,
            base=self._base,
            include_all=not self._sparse_size,
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
            self._copied_end = source.size

    def _report_progress(self) -> None:
        """Call the progress callback, if any."""
        if self._progress is not None:
            self._progress(self._copied_end, self._source.size)

    def _buffers(self) -> tuple[Bytes, Bytes]:
        """Return two new buffers for one worker: for the source, and for the base.

        A worker reuses its buffers, because getting new memory takes as long as copying a chunk
        into it.
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
            # The thread sleeps until all earlier chunks are written, for two reasons.  Offsets must
            # be assigned in the order of the disk.  And the kernel lets only one thread at a time
            # write to a file: threads that contend for its lock take processor time from those that
            # read.
            ticket.wait()
            writes = target.assign_offsets(chunk.start, content.data, data, zeros)
            if target.descriptor >= 0:  # negative in a measurement, which writes nothing
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
        """Read one chunk and write it to a sequential target."""
        data, _ = await run_in_thread(self._read, chunk, content, base_content)
        await target.write_chunk(chunk.start, content.data, data)
        self._count(chunk, data)

    def _count(self, chunk: Chunk, data: Mask) -> None:
        """Add a copied chunk to `data_bytes` and the progress.

        A worker thread must hold its turn (``wait`` to ``finish`` of the ticket), because only one
        thread at a time may change the counters.
        """
        self.data_bytes += masked_bytes(data, self._target.block_size, chunk.length)
        self._copied_end = chunk.start + chunk.length

    def _read(self, chunk: Chunk, content: Bytes, base_content: Bytes) -> tuple[Mask, Mask]:
        """Read a chunk and the same range of the base, if any; for a worker thread.

        Returns:
            Two masks of the blocks of the chunk: the blocks to write as data, and the blocks to
            write as zeros.  With a base, blocks that are equal in the base are in neither mask.
        """
        block_size = self._target.block_size
        read_segments(content, chunk.segments)
        if self._base is None:
            return classify(content, block_size, self._sparse_size)
        base_content = base_content[: chunk.length]
        read_segments(base_content, chunk.base_segments)
        return classify(content, block_size, self._sparse_size, base_content)
