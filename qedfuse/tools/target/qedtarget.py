"""A new QED image, written from front to back as the content of its disk comes."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.errors import HostError, UsageError
from qedfuse.ondisk.constants import ENTRY_BYTES, SECTOR, UNALLOCATED, ZERO
from qedfuse.ondisk.header import build_header
from qedfuse.ondisk.table import SLICE_BYTES
from qedfuse.tools.common.blocks import mask_ranges
from qedfuse.tools.source.chunks import MAX_CHUNK_BYTES
from qedfuse.tools.target.target import ParallelTarget, SequentialTarget, Write, write_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.disk import Disk
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.common.blocks import Mask

_BIG_ENDIAN: Final = sys.byteorder == "big"


class _TableSlice:
    """The slice of a table that is being filled; slices are filled in ascending order."""

    def __init__(self, entries: int) -> None:
        """Begin with a slice that is nowhere yet."""
        self.entries: NDArray[np.uint64] = np.zeros(entries, np.uint64)
        self.offset = 0
        self.number = -1

    def leave(self) -> list[Write]:
        """Give the write of what was filled, if anything was."""
        if not self.entries.any():
            return []
        content = self.entries.byteswap() if _BIG_ENDIAN else self.entries.copy()
        self.entries[:] = UNALLOCATED
        return [Write(self.offset, [content.data.cast("B")])]


class NewQedTarget(ParallelTarget):
    """Lays an image out: the tables where they are first needed, the clusters between them.

    The header comes last.  Memory is for one slice of each level, whatever the geometry.

    Attributes:
        end: Length of the file so far, in bytes.
    """

    def __init__(self, descriptor: int, header: Header, backing: bytes, name: str) -> None:
        """Write to an open, empty file; to none if ``descriptor`` is negative.

        The size of the disk in ``header`` does not matter: see `finish`.
        """
        self.descriptor = descriptor
        self.name = name
        self.block_size = header.cluster_size
        self._header = header
        self._backing = backing
        # A piece lies within one slice of one table: all are powers of two.
        self.max_chunk_bytes = min(MAX_CHUNK_BYTES, header.geometry.table_span)
        self._geometry = header.geometry
        self.end = header.l1_end
        self._slice = min(SLICE_BYTES // ENTRY_BYTES, self._geometry.entries)
        self._l1 = _TableSlice(self._slice)
        self._l2 = _TableSlice(self._slice)

    def place(self, start: int, view: memoryview, data: Mask, hide: Mask) -> list[Write]:
        """Give the clusters of a piece their places, one behind the other."""
        self._check_size(start + len(view))
        if not data.any() and not hide.any():
            return []
        writes = self._move_to(start)
        first = (start >> self._geometry.cluster_bits) % self._slice
        part = self._l2.entries[first : first + len(data)]
        count = int(data.sum())
        where, size = self.end, np.uint64(self.block_size)
        part[data] = np.uint64(where) + np.arange(count, dtype=np.uint64) * size
        part[hide] = ZERO
        self.end += count * self.block_size
        found = mask_ranges(data)
        parts = [view[one * self.block_size : other * self.block_size] for one, other in found]
        return [*writes, Write(where, parts)] if parts else writes

    def _check_size(self, size: int) -> None:
        """Refuse a disk that became larger than the tables can address."""
        most = self._geometry.max_image_size
        if size > most:
            msg = (
                f"{self.name}: image size: found {size} or more, expected at most {most} with "
                f"clusters of {self.block_size} bytes and tables of {self._header.table_size}"
            )
            raise UsageError(msg)

    def _move_to(self, start: int) -> list[Write]:
        """Have the slices for a guest offset at hand; give the writes of those left behind."""
        number = (start >> self._geometry.cluster_bits) // self._slice
        if number == self._l2.number:
            return []
        writes = self._l2.leave()
        l1_index = self._geometry.l1_index(start)
        l1_number = l1_index // self._slice
        if l1_number != self._l1.number:
            writes += self._l1.leave()
            self._l1.number = l1_number
            self._l1.offset = self._header.l1_table_offset + l1_number * self._slice * ENTRY_BYTES
        place = l1_index % self._slice
        if self._l1.entries[place] == UNALLOCATED:
            self._l1.entries[place] = self.end
            self.end += self._geometry.table_bytes
        within = number * self._slice % self._geometry.entries
        self._l2.number = number
        self._l2.offset = int(self._l1.entries[place]) + within * ENTRY_BYTES
        return writes

    def finish(self, size: int) -> None:
        """Write what is left of the tables, and the header."""
        size = -(-size // SECTOR) * SECTOR
        self._check_size(size)
        writes = [*self._l2.leave(), *self._l1.leave()]
        if self.descriptor < 0:
            return
        header = build_header(replace(self._header, image_size=size)) + self._backing
        try:
            os.ftruncate(self.descriptor, self.end)
        except OSError as error:
            raise HostError.from_os(error, self.name, "truncate") from error
        writes.append(Write(0, [memoryview(header)]))
        write_all(self.descriptor, writes, self.name)


class ExistingQedTarget(SequentialTarget):
    """A disk; clusters of zeros are given up."""

    def __init__(self, disk: Disk) -> None:
        """Write to an open disk that is at least as long as the other."""
        self._disk = disk
        self.block_size = disk.header.cluster_size
        self._at = 0

    async def take(self, start: int, view: memoryview, data: Mask) -> None:
        """Write the piece, and zeros before it."""
        await self._clear(start)
        for first, last in mask_ranges(data):
            await self._clear(start + first * self.block_size)
            part = view[first * self.block_size : last * self.block_size]
            await self._disk.write(start + first * self.block_size, part)
            self._at = start + first * self.block_size + len(part)
        await self._clear(start + len(view))

    async def _clear(self, end: int) -> None:
        """Make everything up to an offset zeros that was not written."""
        if self._at < end:
            await self._disk.discard(self._at, end - self._at)
            self._at = end

    async def complete(self, size: int) -> None:
        """Clear the rest of the disk that was copied, and make everything durable."""
        await self._clear(size)
        await self._disk.flush()
