"""Reading some bytes of a disk, wherever they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from qedfuse.disk.lookup.extents import Kind
from qedfuse.errors import CorruptImageError, HostError

if TYPE_CHECKING:
    from qedfuse.tools.source.source import BlockingReader, Source


async def read_bytes(source: Source, start: int, length: int) -> bytes:
    """Return ``length`` bytes of a disk at guest offset ``start``, all within the disk.

    This is for small ranges: the whole result is in memory, and nothing is read ahead.

    Raises:
        CorruptImageError: A table entry for part of the range is bad.
        HostError: The host cannot read a file, or a file ends before the bytes.
    """
    result = bytearray(length)
    at, end = start, start + length
    readers = source.readers()
    while at < end:
        for extent in await source.extents(at, end - at):
            if extent.kind is Kind.BAD:
                raise CorruptImageError(extent.reason)
            if extent.kind is Kind.DATA:
                view = memoryview(result)[extent.start - start : extent.end - start]
                reader = readers[extent.depth]
                await trio.to_thread.run_sync(_read, source, reader, extent.file_offset, view)
            at = extent.end
    return bytes(result)


def _read(source: Source, reader: BlockingReader, offset: int, view: memoryview) -> None:
    """Fill a view from a file.

    Raises:
        HostError: The file cannot be read, or ends too early.
    """
    found = reader.read_blocking(offset, view)
    if found < len(view):
        msg = f"{source.name}: found {found} bytes of data at file offset {offset}, expected "
        raise HostError(msg + str(len(view)))
