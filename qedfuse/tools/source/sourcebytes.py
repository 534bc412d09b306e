"""Reading a small range of a disk, whose bytes may be in several files of the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import CorruptImageError, HostError
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from qedfuse.tools.source.source import BlockingReader, Source


async def read_bytes(source: Source, start: int, length: int) -> bytes:
    """Return ``length`` bytes of a disk at guest offset ``start``.

    The range must lie within the disk, and should be small, because the whole result is in memory.

    Raises:
        CorruptImageError: A table entry for part of the range is invalid.
        HostError: A file cannot be read, or ends before the end of the data.
    """
    result = bytearray(length)
    at, end = start, start + length
    files = source.layer_files()
    while at < end:
        for extent in await source.extents(at, end - at):
            if extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
            if extent.kind is Kind.DATA:
                view = memoryview(result)[extent.start - start : extent.end - start]
                file = files[extent.depth]
                await run_in_thread(read_whole, file, extent.file_offset, view)
            at = extent.end
    return bytes(result)


def read_whole(file: BlockingReader, offset: int, view: memoryview) -> None:
    """Fill ``view`` from a file offset of ``file``; the call blocks.

    Raises:
        HostError: The file cannot be read, or ends too early.
    """
    found = file.read_blocking(offset, view)
    if found < len(view):
        msg = f"{file.name}: data at {offset}: found {found} bytes, expected {len(view)}"
        raise HostError(msg)
