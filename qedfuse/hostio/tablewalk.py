"""Reading a table slice by slice, without the holes of a sparse file.

A table can be 1 GiB of holes, so a walk visits only the slices that hold data.  Other tasks run
between two slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import trio

from qedfuse.ondisk.constants import ENTRY_BYTES
from qedfuse.ondisk.table import SLICE_BYTES, decode, slice_start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

    from qedfuse.hostio.hostfile import HostFile


async def holds_data(file: HostFile, offset: int, length: int) -> bool:
    """Return whether the host stores data for any byte of a range of the file.

    Raises:
        HostError: A system call failed.
    """
    data = await file.next_data(offset)
    return data is not None and data < offset + length


def read_table(
    file: HostFile, table_offset: int, length: int
) -> AsyncIterator[tuple[int, NDArray[np.uint64]]]:
    """Return an iterator that reads the slices of a table that hold data, and skips the holes.

    Args:
        file: The image.
        table_offset: File offset of the table.
        length: How many bytes of the table to read, from its beginning.

    Yields:
        (index in the table of the first entry, entries) of each slice that holds data.  The last
        slice may have fewer entries; an incomplete last entry is left out.

    Raises:
        HostError: A system call failed.
    """
    return _TableReader(file, table_offset, length)


class DataSlices:
    """The slices of a table that hold data: an asynchronous iterator over file offsets.

    A class, because trio warns about an asynchronous generator that is left unfinished.
    """

    def __init__(
        self,
        file: HostFile,
        table_offset: int,
        length: int,
        *,
        slice_bytes: int = SLICE_BYTES,
        skip: int = 0,
    ) -> None:
        """Prepare to walk through a table, from byte ``skip`` up to byte ``length``.

        Args:
            file: The image.
            table_offset: File offset of the table.
            length: How many bytes of the table to walk through, from its beginning.
            slice_bytes: Length of a slice in bytes; the first slice begins where the table does.
            skip: Bytes at the beginning of the table to leave out; a multiple of ``slice_bytes``.
        """
        self._file = file
        self._table_offset = table_offset
        self._end = table_offset + length
        self._slice_bytes = slice_bytes
        self._next = table_offset + skip

    def __aiter__(self) -> Self:
        """Return the iterator itself."""
        return self

    async def __anext__(self) -> int:
        """Return the file offset of the next slice with data.

        The call is a checkpoint of trio, except after the end of the table.

        Raises:
            StopAsyncIteration: No further slice holds data.
            HostError: A system call failed.
        """
        if self._next >= self._end:
            raise StopAsyncIteration
        await trio.lowlevel.checkpoint()
        data = await self._file.next_data(self._next)
        if data is None or data >= self._end:
            raise StopAsyncIteration
        offset = max(self._next, slice_start(self._table_offset, data, self._slice_bytes))
        self._next = offset + self._slice_bytes
        return offset


class _TableReader:
    """The entries of a table, slice by slice; see `read_table`."""

    def __init__(self, file: HostFile, table_offset: int, length: int) -> None:
        self._file = file
        self._table_offset = table_offset
        self._end = table_offset + length
        self._slices = DataSlices(file, table_offset, length)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, NDArray[np.uint64]]:
        offset = await anext(self._slices)
        raw = await self._file.pread(offset, min(SLICE_BYTES, self._end - offset))
        entries = decode(raw[: len(raw) & -ENTRY_BYTES])
        return (offset - self._table_offset) // ENTRY_BYTES, np.frombuffer(entries, np.uint64)
