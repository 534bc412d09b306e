"""Reading a table slice by slice, without the holes of a sparse file.

A table can be 1 GiB of holes.  So a walk through a table asks the host where the next data
is, and visits only the slices that hold data.  Other tasks run between two slices.
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
        HostError: The host refused.
    """
    data = await file.next_data(offset)
    return data is not None and data < offset + length


def read_table(
    file: HostFile, table: int, length: int
) -> AsyncIterator[tuple[int, NDArray[np.uint64]]]:
    """Read the first ``length`` bytes of the table at file offset ``table``, except for holes.

    Yields:
        (index of the first entry, entries) of each slice that holds data.
    """
    return _TableReader(file, table, length)


class DataSlices:
    """The slices of a table that hold data: an asynchronous iterator over file offsets.

    This is a class and not an asynchronous generator, because Python warns about a generator
    that is left unfinished when the loop over it raises.
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
            length: Length in bytes of the table, or of the part to walk through.
            slice_bytes: Length of a slice; slices lie side by side from ``table`` on.
            skip: Bytes to leave out at the beginning of the table; a multiple of
                ``slice_bytes``.
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
        """Return the file offset of the next slice with data; a checkpoint.

        Raises:
            HostError: The host refused.
        """
        if self._next >= self._end:
            raise StopAsyncIteration
        await trio.lowlevel.checkpoint()
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
