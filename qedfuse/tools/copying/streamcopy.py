"""Copying a raw stream, whose length is known only at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qedfuse.errors import UsageError
from qedfuse.tools.common.blocks import classify, masked_bytes
from qedfuse.tools.common.formatprobe import format_of
from qedfuse.tools.target.target import ParallelTarget, finish_target, perform_writes
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from qedfuse.tools.common.pipe import Stream
    from qedfuse.tools.target.target import Target
    from qedfuse.util.backgroundtasks import Progress


async def copy_stream(
    stream: Stream,
    target: Target,
    *,
    sparse_size: int,
    any_content: bool,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Copy a raw stream up to its end, and complete the target.

    Args:
        stream: The stream to read.
        target: The target to write to.
        sparse_size: Minimum length in bytes of a run of zeros that is not written as data; 0
            writes all zeros as data.
        any_content: Accept a stream whatever its first bytes are.
        progress: Called with two equal arguments, the bytes copied so far; the total is unknown.

    Returns:
        The length of the stream in bytes, and how many of the bytes were copied as data.

    Raises:
        UsageError: ``any_content`` is False, and the stream begins like an image or like content
            that is encrypted by LUKS; or the stream is longer than the target can be.
        BrokenPipeError: The target is a pipe whose reading end is closed.
        QedError: The stream cannot be read, or the target cannot be written.
    """
    buffer = np.empty(max(target.max_chunk_bytes, target.block_size), np.uint8)
    size = data_bytes = 0
    while True:
        count = await _fill(stream, buffer.data)
        if not size and not any_content and format_of(buffer[:count].data, stream.name) != "raw":
            msg = (
                f"{stream.name}: found a QED image, expected raw content (a QED image can be "
                "read from a file, but not from a pipe)"
            )
            raise UsageError(msg)
        if count:
            content = buffer[:count]
            data, zeros = await run_in_thread(classify, content, target.block_size, sparse_size)
            if isinstance(target, ParallelTarget):
                writes = target.assign_offsets(size, content.data, data, zeros)
                await run_in_thread(perform_writes, target.descriptor, writes, target.name)
            else:
                await target.write_chunk(size, content.data, data)
            size += count
            data_bytes += masked_bytes(data, target.block_size, count)
            if progress is not None:
                progress(size, size)
        if count < len(buffer):
            await finish_target(target, size)
            return size, data_bytes


async def _fill(stream: Stream, view: memoryview) -> int:
    """Fill a buffer from a stream; return the number of bytes, fewer only at the stream's end."""
    filled = 0
    while filled < len(view) and (count := await stream.read(view[filled:])):
        filled += count
    return filled
