"""Comparing the content of two disks, whatever the formats of their files."""

from __future__ import annotations

import threading
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import HostError
from qedfuse.tools.common.blocks import equal_blocks
from qedfuse.tools.common.workerpool import WorkerPool
from qedfuse.tools.source.chunks import Chunker, read_segments
from qedfuse.tools.source.extentbatches import extent_batches
from qedfuse.util.backgroundtasks import periodic_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.tools.common.workerpool import Ticket
    from qedfuse.tools.source.chunks import Chunk
    from qedfuse.tools.source.source import Source
    from qedfuse.util.backgroundtasks import Progress


_COMPARE_CHUNK_BYTES: Final = 1 << 20
"""Maximum length of a chunk; two buffers of this size fit into a processor's cache."""

_BLOCK_BYTES: Final = 4096
"""Chunks consist of whole blocks of this size, except at the end of the disk."""

_WORKER_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        identical: Whether the content is equal, and with ``strict`` also the sizes and the
            allocation.
        reason: What differs first; None if the disks are identical.

            - ``content``: the bytes at ``offset`` differ.
            - ``size``, only with ``strict``: the sizes differ, so nothing else was compared.
            - ``allocation``, only with ``strict``: only one disk stores data at ``offset``.
        offset: Guest offset in bytes of the first difference; None if there is none or only the
            sizes differ.
        sizes: Sizes of the two disks in bytes.
    """

    identical: bool
    reason: Literal["content", "size", "allocation"] | None
    offset: int | None
    sizes: tuple[int, int]


async def compare(
    first: Source, second: Source, *, strict: bool = False, progress: Progress | None = None
) -> Comparison:
    """Compare two disks; return their first difference, or that they are identical.

    Past its end the shorter disk counts as zeros.

    Args:
        first: One disk.
        second: The other disk.
        strict: Also require the same size, and data in the same ranges.
        progress: Called with the guest offset that the comparison has reached, and the size of the
            longer disk.

    Raises:
        CorruptImageError: A table entry is bad, and no difference was found before its range.
        HostError: A file cannot be read.
    """
    sizes = first.size, second.size
    if strict and first.size != second.size:
        return Comparison(identical=False, reason="size", offset=None, sizes=sizes)
    # `extent_batches` ends where its first disk ends, so the longer disk is passed first.
    longer, shorter = (first, second) if first.size >= second.size else (second, first)
    search = _Search()
    pool = WorkerPool([search.worker() for _ in range(_WORKER_THREADS)])
    chunker = Chunker(longer, _BLOCK_BYTES, _COMPARE_CHUNK_BYTES, base=shorter)
    report_progress = (lambda: progress(search.progress_offset, longer.size)) if progress else None
    async with (
        periodic_progress(report_progress),
        aclosing(extent_batches(longer, _BLOCK_BYTES, shorter)) as batches,
    ):
        async for batch in batches:
            extents, other_extents = batch.extents, batch.base_extents
            allocation = _allocation_difference(extents, other_extents) if strict else None
            await pool.run(search.limit(chunker.chunks(batch), allocation))
            content = search.lowest_difference
            if content is not None and (allocation is None or content < allocation):
                return Comparison(identical=False, reason="content", offset=content, sizes=sizes)
            if allocation is not None:
                return Comparison(
                    identical=False, reason="allocation", offset=allocation, sizes=sizes
                )
            search.progress_offset = batch.end
    return Comparison(identical=True, reason=None, offset=None, sizes=sizes)


async def verify_copy(source: Source, copy: Source, name: str) -> None:
    """Read a copy back and compare it with its source; raise an error if they differ.

    Past the end of the source, the old content of the target was not overwritten, and is ignored.

    Args:
        source: The disk that was copied.
        copy: The copy.
        name: Name of the copy in messages.

    Raises:
        HostError: The contents differ; the message names the first offset.
        QedError: The source or the copy cannot be read, or has a bad table entry.
    """
    result = await compare(source, copy)
    if result.offset is not None and result.offset < source.size:
        msg = f"{name}: content at {result.offset}: found other bytes than in {source.name}"
        raise HostError(msg)


class _Search:
    """The search for the first difference, in several threads.

    Attributes:
        lowest_difference: Guest offset of the lowest difference found so far; None for none.
        progress_offset: Guest offset that is reported as progress.
    """

    def __init__(self) -> None:
        """Prepare a search that has found nothing yet."""
        self._lock = threading.Lock()
        self.lowest_difference: int | None = None
        self.progress_offset = 0

    def limit(self, chunks: Iterator[Chunk], end: int | None) -> Iterator[Chunk]:
        """Yield chunks until a difference is found, or a chunk begins past ``end``."""
        for chunk in chunks:
            if self.lowest_difference is not None or (end is not None and chunk.start > end):
                return
            self.progress_offset = chunk.start
            yield chunk

    def worker(self) -> Callable[[Chunk, Ticket], None]:
        """Return a function that compares one chunk in a worker thread, with its own buffers."""
        buffers = tuple(np.empty(_COMPARE_CHUNK_BYTES, np.uint8) for _ in range(2))

        def compare_chunk(chunk: Chunk, _ticket: Ticket) -> None:
            one, other = (buffer[: chunk.length] for buffer in buffers)
            read_segments(one, chunk.segments)
            read_segments(other, chunk.base_segments)
            equal = equal_blocks(one, other, _BLOCK_BYTES)
            if equal.all():
                return
            at = int(equal.argmin()) * _BLOCK_BYTES
            differs = one[at : at + _BLOCK_BYTES] != other[at : at + _BLOCK_BYTES]
            offset = chunk.start + at + int(differs.argmax())
            with self._lock:
                # Other threads may still find a difference at a lower offset.  From now on `limit`
                # yields no chunk.  Chunks are yielded in ascending order, so no lower difference is
                # missed.
                self.lowest_difference = (
                    offset
                    if self.lowest_difference is None
                    else min(self.lowest_difference, offset)
                )

        return compare_chunk


def _allocation_difference(one: list[Extent], other: list[Extent]) -> int | None:
    """Return the first guest offset at which only one of two disks has data; None for none.

    The lists have no gaps; ``other`` ends where its disk ends.
    """
    ends = {extent.end: None for extent in (*one, *other)}
    extents = [iter(one), iter(other)]
    current = [next(side, None) for side in extents]
    start = min((extent.start for extent in current if extent), default=0)
    for end in sorted(ends):
        if _is_data(current[0]) is not _is_data(current[1]):
            return start
        start = end
        for side, extent in enumerate(current):
            if extent is not None and extent.end <= end:
                current[side] = next(extents[side], None)
    return None


def _is_data(extent: Extent | None) -> bool:
    """Return whether an extent is data; False for None (a range past the disk's end)."""
    return extent is not None and extent.kind is Kind.DATA
