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
"""Bytes of each disk in a chunk; two such buffers fit into a processor's cache."""

_BLOCK_BYTES: Final = 4096
"""Chunks begin and end at multiples of it, and are compared in blocks of it."""

_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        identical: Whether the disks are the same, in the sense that was asked for.
        reason: What differs first: the content, or with ``strict`` the size or the
            allocation.
        offset: Guest offset of the first difference in bytes; None if the sizes differ.
        sizes: Bytes of the two disks.
    """

    identical: bool
    reason: Literal["content", "size", "allocation"] | None
    offset: int | None
    sizes: tuple[int, int]


async def compare(
    first: Source, second: Source, *, strict: bool = False, progress: Progress | None = None
) -> Comparison:
    """Compare two disks; what the longer one has past the end of the other must be zeros.

    Args:
        first: One disk.
        second: The other disk.
        strict: Also require the same size, and data in the same ranges.
        progress: Called with the bytes compared so far and in all.

    Raises:
        CorruptImageError: A table entry is bad.
        HostError: A file cannot be read.
    """
    sizes = first.size, second.size
    if strict and first.size != second.size:
        return Comparison(identical=False, reason="size", offset=None, sizes=sizes)
    # The batches cover their first disk, so that is the longer one.
    longer, shorter = (first, second) if first.size >= second.size else (second, first)
    search = _Search(longer, shorter)
    pool = WorkerPool([search.worker() for _ in range(_THREADS)])
    chunker = Chunker(longer, _BLOCK_BYTES, _COMPARE_CHUNK_BYTES, base=shorter)
    report = (lambda: progress(search.done, longer.size)) if progress else None
    async with (
        periodic_progress(report),
        aclosing(extent_batches(longer, _BLOCK_BYTES, shorter)) as batches,
    ):
        async for batch in batches:
            apart = _allocation_differs_at(batch.extents, batch.base_extents) if strict else None
            await pool.run(search.limit(chunker.chunks(batch), apart))
            if search.found is not None and (apart is None or search.found < apart):
                return Comparison(
                    identical=False, reason="content", offset=search.found, sizes=sizes
                )
            if apart is not None:
                return Comparison(identical=False, reason="allocation", offset=apart, sizes=sizes)
            search.done = batch.end
    return Comparison(identical=True, reason=None, offset=None, sizes=sizes)


async def verify_copy(source: Source, copy: Source, name: str) -> None:
    """Read a copy back and compare it with its source; it may be longer than the source.

    Args:
        source: The disk that was copied.
        copy: Its copy.
        name: Name of the copy in messages.

    Raises:
        HostError: They differ; the message has the first offset.
        QedError: One of them cannot be read.
    """
    found = await compare(source, copy)
    # Past the end of the source an existing target keeps its old content.
    if found.offset is not None and found.offset < source.size:
        msg = f"{name}: content at {found.offset}: found other bytes than in {source.name}"
        raise HostError(msg)


class _Search:
    """The search for the first difference, in several threads.

    Attributes:
        found: Guest offset of the first difference so far; None if there is none.
        done: Guest offset up to which the disks have been compared.
    """

    def __init__(self, one: Source, other: Source) -> None:
        """Compare two disks."""
        self._names = one.name, other.name
        self._lock = threading.Lock()
        self.found: int | None = None
        self.done = 0

    def limit(self, chunks: Iterator[Chunk], end: int | None) -> Iterator[Chunk]:
        """Yield chunks in order, but none after a difference was found, or past ``end``."""
        for chunk in chunks:
            if self.found is not None or (end is not None and chunk.start > end):
                return
            self.done = chunk.start
            yield chunk

    def worker(self) -> Callable[[Chunk, Ticket], None]:
        """Return a function that compares one chunk in a worker thread, with its own buffers."""
        buffers = tuple(np.empty(_COMPARE_CHUNK_BYTES, np.uint8) for _ in range(2))

        def compare_chunk(chunk: Chunk, _ticket: Ticket) -> None:
            one, other = (buffer[: chunk.length] for buffer in buffers)
            read_segments(one, chunk.segments, self._names[0])
            read_segments(other, chunk.base_segments, self._names[1])
            equal = equal_blocks(one, other, _BLOCK_BYTES)
            if equal.all():
                return
            at = int(equal.argmin()) * _BLOCK_BYTES
            differs = one[at : at + _BLOCK_BYTES] != other[at : at + _BLOCK_BYTES]
            offset = chunk.start + at + int(differs.argmax())
            with self._lock:
                # Chunks are begun in order, so one that is not begun lies behind this offset.
                self.found = offset if self.found is None else min(self.found, offset)

        return compare_chunk


def _allocation_differs_at(one: list[Extent], other: list[Extent]) -> int | None:
    """Return the first offset that is data in one list and not in the other; None if none.

    Zeros and unallocated ranges count as the same: what is unallocated in an image may be
    zeros in its overlay.
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
    """Return whether an extent is data; None stands for past the end of the disk."""
    return extent is not None and extent.kind is Kind.DATA
