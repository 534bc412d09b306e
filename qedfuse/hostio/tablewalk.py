"""Reading a table slice by slice, without the holes of a sparse file.

A table can be 1 GiB of holes.  So a walk through a table asks the host where the next data
is, and visits only the slices of 64 KiB that hold some.  Other tasks run between slices.
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
    """Return whether the host stores any byte of a range of the file."""
    data = await file.next_data(offset)
    return data is not None and data < offset + length


def read_table(
    file: HostFile, table: int, length: int
) -> AsyncIterator[tuple[int, NDArray[np.uint64]]]:
    """Read the first ``length`` bytes of a table at a file offset, leaving out holes.

    Yields:
        (index of the first entry, entries) of each slice that holds data.
    """
    return _TableReader(file, table, length)


class DataSlices:
    """The slices of a table that hold data: an asynchronous iterator over file offsets.

    A class and no generator: Python warns about an asynchronous generator that an exception
    in the loop leaves unfinished.
    """

    def __init__(
        self,
        file: HostFile,
        table: int,
        length: int,
        *,
        slice_bytes: int = SLICE_BYTES,
        skip: int = 0,
    ) -> None:
        """Walk through the ``length`` bytes of a table.

        Args:
            file: The image.
            table: File offset of the table.
            length: Its length in bytes, or that of the part to be walked through.
            slice_bytes: Length of a slice; each begins at a multiple of it from ``table``.
            skip: Bytes of the table to leave out at its beginning, whole slices.
        """
        self._file = file
        self._table = table
        self._end = table + length
        self._slice_bytes = slice_bytes
        self._next = table + skip

    def __aiter__(self) -> Self:
        """Return the iterator itself."""
        return self

    async def __anext__(self) -> int:
        """Return the file offset of the next slice with data, after other tasks have run."""
        await trio.lowlevel.checkpoint()
        if self._next >= self._end:
            raise StopAsyncIteration
        data = await self._file.next_data(self._next)
        if data is None or data >= self._end:
            raise StopAsyncIteration
        offset = max(self._next, slice_start(self._table, data, self._slice_bytes))
        self._next = offset + self._slice_bytes
        return offset


class _TableReader:
    """The entries of a table, slice by slice; see `read_table`."""

    def __init__(self, file: HostFile, table: int, length: int) -> None:
        self._file = file
        self._table = table
        self._end = table + length
        self._slices = DataSlices(file, table, length)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, NDArray[np.uint64]]:
        offset = await anext(self._slices)
        raw = await self._file.pread(offset, min(SLICE_BYTES, self._end - offset))
        entries = decode(raw[: len(raw) & -ENTRY_BYTES])
        return (offset - self._table) // ENTRY_BYTES, np.frombuffer(entries, np.uint64)
