"""QED targets: a new image, whose clusters lie in the order of the disk, and an existing image."""

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
from qedfuse.tools.target.target import ParallelTarget, SequentialTarget, Write, perform_writes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.disk.disk import Disk
    from qedfuse.ondisk.header import Header
    from qedfuse.tools.common.blocks import Mask

_BIG_ENDIAN: Final = sys.byteorder == "big"


class _TableSlice:
    """A slice (a part of a table) that is being filled; slices are filled in ascending order.

    Attributes:
        entries: The entries of the slice.
        offset: File offset of the slice in bytes; 0 before the first slice.
        slice_index: Index of the slice in the L1 table, or counted over the L2 tables of the whole
            disk; -1 before the first slice.
    """

    def __init__(self, length: int) -> None:
        """Prepare a buffer of ``length`` entries, which holds one slice after another."""
        self.entries: NDArray[np.uint64] = np.zeros(length, np.uint64)
        self.offset = 0
        self.slice_index = -1

    def take_writes(self) -> list[Write]:
        """Clear the entries; return a list with the write of the slice, or [] if all were 0."""
        if not self.entries.any():
            return []
        content = self.entries.byteswap() if _BIG_ENDIAN else self.entries.copy()
        self.entries[:] = UNALLOCATED
        return [Write(self.offset, [content.data.cast("B")])]


class NewQedTarget(ParallelTarget):
    """A new image.

    Each L2 table lies before its data clusters in the file.  The header is written last.  Only one
    slice of the L1 table and one slice of an L2 table are in memory.

    Attributes:
        end: Length in bytes that the file needs for the tables and clusters assigned so far.
    """

    def __init__(self, descriptor: int, header: Header, backing: bytes, name: str) -> None:
        """Prepare an image in an open, empty file.

        Args:
            descriptor: The file; negative to write nothing.
            header: The geometry and features; `finish` sets the image size.
            backing: Name of the backing file, as stored; empty if the image has none.
            name: Name of the file in messages.
        """
        self.descriptor = descriptor
        self.name = name
        self.block_size = header.cluster_size
        self._header = header
        self._backing = backing
        # `assign_offsets` changes the entries of one slice of an L2 table only, so a chunk must lie
        # in the range of one slice.  A chunk of one cluster does.  A longer chunk crosses no
        # multiple of `max_chunk_bytes`, and each slice begins at such a multiple: the range of a
        # slice is that of a whole table, or at least 32 MiB, and all lengths are powers of two.
        self.max_chunk_bytes = min(MAX_CHUNK_BYTES, header.geometry.table_span)
        self._geometry = header.geometry
        self.end = header.l1_end
        self._slice_length = min(SLICE_BYTES // ENTRY_BYTES, self._geometry.entries)
        self._l1 = _TableSlice(self._slice_length)
        self._l2 = _TableSlice(self._slice_length)

    def assign_offsets(self, start: int, view: memoryview, data: Mask, zeros: Mask) -> list[Write]:
        """Assign offsets at the end of the file to a chunk's data clusters; return the writes.

        If the previous chunk was in another slice, the result begins with the writes of the slices
        that no longer change.
        """
        self._check_size(start + len(view))
        if not data.any() and not zeros.any():
            return []
        writes = self._select_slices(start)
        first_entry = (start >> self._geometry.cluster_bits) % self._slice_length
        entries = self._l2.entries[first_entry : first_entry + len(data)]
        count = int(data.sum())
        offset, size = self.end, np.uint64(self.block_size)
        entries[data] = np.uint64(offset) + np.arange(count, dtype=np.uint64) * size
        entries[zeros] = ZERO
        self.end += count * self.block_size
        buffers = [
            view[first * self.block_size : last * self.block_size]
            for first, last in mask_ranges(data)
        ]
        return [*writes, Write(offset, buffers)] if buffers else writes

    def _check_size(self, size: int) -> None:
        """Raise UsageError if the tables cannot address a disk of ``size`` bytes."""
        maximum = self._geometry.max_image_size
        if size > maximum:
            msg = (
                f"{self.name}: image size: found {size} or more, expected at most {maximum} with "
                f"clusters of {self.block_size} bytes and tables of {self._header.table_size} "
                "clusters"
            )
            raise UsageError(msg)

    def _select_slices(self, start: int) -> list[Write]:
        """Switch to the L1 and L2 slices for a guest offset; return the writes of the old slices.

        A missing L2 table is allocated at the end of the file.
        """
        l2_slice = (start >> self._geometry.cluster_bits) // self._slice_length
        if l2_slice == self._l2.slice_index:
            return []
        writes = self._l2.take_writes()
        l1_index = self._geometry.l1_index(start)
        l1_slice = l1_index // self._slice_length
        if l1_slice != self._l1.slice_index:
            writes += self._l1.take_writes()
            self._l1.slice_index = l1_slice
            l1_position = l1_slice * self._slice_length * ENTRY_BYTES
            self._l1.offset = self._header.l1_table_offset + l1_position
        index = l1_index % self._slice_length
        if self._l1.entries[index] == UNALLOCATED:
            self._l1.entries[index] = self.end
            self.end += self._geometry.table_bytes
        first_l2_index = l2_slice * self._slice_length % self._geometry.entries
        self._l2.slice_index = l2_slice
        self._l2.offset = int(self._l1.entries[index]) + first_l2_index * ENTRY_BYTES
        return writes

    def finish(self, size: int) -> None:
        """Set the length of the file, write the last slices, and write the header last.

        ``size`` is rounded up to whole sectors.  Without a file only the size is checked.

        Raises:
            UsageError: The tables cannot address a disk of ``size`` bytes.
            HostError: A system call failed.
        """
        size = -(-size // SECTOR) * SECTOR
        self._check_size(size)
        writes = [*self._l2.take_writes(), *self._l1.take_writes()]
        if self.descriptor < 0:
            return
        header = build_header(replace(self._header, image_size=size)) + self._backing
        try:
            os.ftruncate(self.descriptor, self.end)
        except OSError as error:
            raise HostError.from_os(error, self.name, "truncate") from error
        writes.append(Write(0, [memoryview(header)]))
        perform_writes(self.descriptor, writes, self.name)


class ExistingQedTarget(SequentialTarget):
    """An existing image, written as a guest would; ranges of zeros become discards."""

    def __init__(self, disk: Disk) -> None:
        """Prepare to write to an open disk that is at least as large as the source."""
        self._disk = disk
        self.block_size = disk.header.cluster_size
        self._written_end = 0  # guest offset up to which the disk is written or discarded

    async def write_chunk(self, start: int, view: memoryview, data: Mask) -> None:
        """Write blocks of data; discard blocks of zeros, and the gap after the previous chunk."""
        await self._discard(start)
        for first, last in mask_ranges(data):
            await self._discard(start + first * self.block_size)
            content = view[first * self.block_size : last * self.block_size]
            await self._disk.write(start + first * self.block_size, content)
            self._written_end = start + first * self.block_size + len(content)
        await self._discard(start + len(view))

    async def finish(self, size: int) -> None:
        """Discard all from the end of the last chunk up to ``size``; make the image durable."""
        await self._discard(size)
        await self._disk.flush()

    async def _discard(self, end: int) -> None:
        """Discard from the end of the last write or discard to ``end``; skip an empty range."""
        if self._written_end < end:
            await self._disk.discard(self._written_end, end - self._written_end)
            self._written_end = end
