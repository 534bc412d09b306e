"""Writing to an image under repair, in an order that survives a crash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.state.freelistwriter import erase_descriptor
from qedfuse.errors import NoSpaceError
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES, MAX_OFFSET
from qedfuse.ondisk.freelist import (
    DESCRIPTOR_BYTES,
    DESCRIPTOR_OFFSET,
    backing_name_covers_descriptor,
)
from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Values
    from qedfuse.ondisk.header import Header

    Save = Callable[[int, bytes, bytes], None]
    """Called with the file offset, the old bytes and the new bytes of one change."""

_COPY_BYTES: Final = 1 << 20
"""Maximum number of bytes in one read or write of a copy, and in one write of equal entries."""


class Rewriter:
    """Writes copies and new tables to the end of an image, and changes entries in place.

    The methods raise NoSpaceError if the host is full or the image would be longer than a file can
    be, and HostError if a system call fails for another reason.

    Attributes:
        end: The file offset from which on copies and tables are appended; a multiple of the cluster
            size.
        changes_file: Whether the methods write to the file; False in a `DryRunRewriter`.
    """

    changes_file = True

    def __init__(self, file: HostFile, header: Header) -> None:
        """Prepare to change ``file``, whose header is ``header``."""
        self._file = file
        self._header = header
        self.end = self._checked_end(header.geometry.ceil(file.size()))
        self._avoided = np.empty(0, np.uint64)
        self._has_pending = False  # whether entries were written that may still be lost in a crash

    async def write_need_check(self, *, need_check: bool) -> None:
        """Make all earlier writes durable; then set or clear NEED_CHECK, durably.

        The same write clears unknown autoclear bits, and drops the persistent free list, because a
        repair does not update the list.  The bytes that described the list are zeroed, but not
        durably.
        """
        await self._file.datasync()
        await self._file.pwrite(0, self._built_header(need_check=need_check))
        await self._file.datasync()
        if self._header.has_free_list:
            await erase_descriptor(self._file, self._header)

    def _built_header(self, *, need_check: bool) -> bytes:
        """Encode the header with NEED_CHECK as given, and without a free list."""
        header = self._header.with_need_check(value=need_check).without_stale_autoclear()
        return build_header(header.with_free_list(value=False))

    async def extend(self, end: int) -> None:
        """Make the file at least ``end`` bytes long, durably; the new bytes read as zeros."""
        self.end = max(self.end, self._checked_end(end))
        if self._file.size() < self.end:
            await self._file.truncate(self.end)
            await self._file.datasync()

    async def copy(self, start: int, length: int) -> int:
        """Copy a range of the file to the end of the file; return the file offset of the copy.

        Holes and chunks of zeros become holes in the copy.  The copy is not durable yet.
        """
        target = self._allocate(length)
        await self._file.truncate(self.end)
        at = 0
        while at < length and (data := await self._file.next_data(start + at)) is not None:
            at = max(at, data - start)
            if at < length:
                chunk = await self._file.pread(start + at, min(_COPY_BYTES, length - at))
                if any(chunk):
                    await self._file.pwrite(target + at, chunk)
                at += _COPY_BYTES
        return target

    async def new_table(self, value: int, count: int) -> int:
        """Append a table whose first ``count`` entries are ``value``; return its file offset.

        The other entries are 0.  The table is not durable yet.
        """
        target = self._allocate(self._header.geometry.table_bytes)
        await self._file.truncate(self.end)
        await self.fill(target, count, value)
        return target

    async def fill(self, start: int, count: int, value: int) -> None:
        """Set the ``count`` entries that begin at the file offset ``start`` to ``value``.

        Entries of the value 0 are not written; they must be 0 already, or lie past the end of the
        file.  `sync_pending` makes the entries durable.
        """
        entries_per_write = _COPY_BYTES // ENTRY_BYTES
        data = value.to_bytes(ENTRY_BYTES, "little") * min(entries_per_write, count)
        while count > 0 and value:
            self._has_pending = True
            await self._file.pwrite(start, data[: count * ENTRY_BYTES])
            start += len(data)
            count -= entries_per_write

    async def replace_entries(self, offset: int, old: Values, new: Values) -> None:
        """Write the new entries, from the first to the last one that differs from its old entry.

        All earlier writes are made durable first, so everything to which the entries point is
        durable.  The entries themselves are not durable yet.

        Args:
            offset: The file offset of the first entry.
            old: The entries in the file.
            new: The new entries.
        """
        begin, end = _changed_range(old, new)
        if begin < end:
            await self.overwrite(
                offset + begin * ENTRY_BYTES, _bytes(old[begin:end]), _bytes(new[begin:end])
            )

    async def overwrite(self, offset: int, _old: bytes, new: bytes) -> None:
        """Write ``new`` at a file offset in a table, after making all earlier writes durable.

        `sync_pending` makes ``new`` durable.  Only a dry run uses the old bytes.
        """
        await self._file.datasync()
        self._has_pending = True
        await self._file.pwrite(offset, new)

    async def clear_entries(self, offset: int, old: Values, new: Values) -> None:
        """Write the new entries, which differ from the old ones only where they are cleared.

        No earlier write needs to be durable first, because a cleared entry points to no cluster.
        `sync_pending` makes the entries durable.
        """
        begin, end = _changed_range(old, new)
        if begin < end:
            self._has_pending = True
            await self._file.pwrite(offset + begin * ENTRY_BYTES, _bytes(new[begin:end]))

    async def sync_pending(self) -> None:
        """Make durable what `clear_entries`, `fill` and `overwrite` have written.

        Two kinds of changes must be durable before the caller makes the file longer.  Cleared
        entries: a crash could leave a longer file with the old entries, and one that pointed past
        the end of the file may be valid in the longer file.  The missing entries of a table that
        the end of the file cuts short: a crash could leave a longer file in which they are
        unallocated.  After `new_table` no call is needed, because no entry points to the new table
        yet.
        """
        if self._has_pending:
            await self._file.datasync()
            self._has_pending = False

    def set_avoided(self, offsets: Values) -> None:
        """Exclude the clusters at ``offsets``, which must ascend, from all later allocations."""
        self._avoided = offsets

    def _allocate(self, length: int) -> int:
        """Allocate bytes at the end of the file, without avoided clusters; return their offset."""
        target = self.end
        while True:
            index = int(np.searchsorted(self._avoided, target))
            if index == len(self._avoided) or self._avoided[index] >= target + length:
                break
            target = int(self._avoided[index]) + self._header.cluster_size
        self.end = self._checked_end(target + length)
        return target

    def _checked_end(self, end: int) -> int:
        """Return ``end`` unchanged; raise `NoSpaceError` if a file cannot be that long."""
        if end > MAX_OFFSET:
            msg = f"{self._file.name}: file size: found {end}, expected at most {MAX_OFFSET}"
            raise NoSpaceError(msg)
        return end


class DryRunRewriter(Rewriter):
    """Writes nothing; counts what a repair would write, and passes each change to a function.

    Attributes:
        written: Approximate number of bytes that would have been written so far, without holes and
            without the header.
    """

    changes_file = False

    def __init__(self, file: HostFile, header: Header, save: Save | None = None) -> None:
        """Prepare; ``save``, if given, is called for each change inside the present file."""
        super().__init__(file, header)
        self.written = 0
        # The range that was copied last: its file offset, length, and bytes that are not in holes.
        self._last_copy = (0, 0, 0)
        self._size = file.size()
        self._save = save or (lambda _offset, _old, _new: None)

    async def write_need_check(self, *, need_check: bool) -> None:  # noqa: ARG002  what counts is the header at the end
        """Save the changes of the header, and of the bytes that describe a free list.

        The new header is the one at the end of the repair, without NEED_CHECK.
        """
        old = bytes(await self._file.pread(0, HEADER_BYTES))
        self._save(0, old, self._built_header(need_check=False))
        if self._header.has_free_list and not backing_name_covers_descriptor(self._header):
            old = bytes(await self._file.pread(DESCRIPTOR_OFFSET, DESCRIPTOR_BYTES))
            self._save(DESCRIPTOR_OFFSET, old, bytes(len(old)))

    async def extend(self, end: int) -> None:
        """Record that the file would have at least ``end`` bytes."""
        self.end = max(self.end, self._checked_end(end))

    async def copy(self, start: int, length: int) -> int:
        """Count the bytes of a copy; return the file offset that the copy would have."""
        # If thousands of entries refer to one cluster, it is copied thousands of times in a row.
        # Its holes are searched for only once.
        if self._last_copy[:2] != (start, length):
            self._last_copy = (start, length, await self._data_bytes(start, start + length))
        self.written += self._last_copy[2]
        return self._allocate(length)

    async def new_table(self, _value: int, _count: int) -> int:
        """Count the bytes of a table; return the file offset that the table would have."""
        length = self._header.geometry.table_bytes
        self.written += length
        return self._allocate(length)

    async def fill(self, _start: int, count: int, value: int) -> None:
        """Count the bytes of the entries; entries with the value 0 would not be written."""
        self.written += count * ENTRY_BYTES if value else 0

    async def clear_entries(self, _offset: int, _old: Values, _new: Values) -> None:
        """Do nothing, because `overwrite` counts and saves these entries later.

        In a dry run the entries keep their values in the file, so the later steps find them again.
        """

    async def overwrite(self, offset: int, old: bytes, new: bytes) -> None:
        """Count the new bytes; save the change if ``offset`` lies inside the present file."""
        self.written += len(new)
        if offset < self._size:
            self._save(offset, old, new)

    async def _data_bytes(self, start: int, end: int) -> int:
        """Return how many bytes of the file from ``start`` to ``end`` are not holes."""
        total = 0
        while start < end:
            await trio.lowlevel.checkpoint()
            data = await self._file.next_data(start)
            if data is None or data >= end:
                break
            start = min(end, await self._file.next_hole(data) or end)
            total += start - data
        return total


def _changed_range(old: Values, new: Values) -> tuple[int, int]:
    """Return the range of indices from the first to the last entry that differs; can be empty."""
    where = np.flatnonzero(old != new)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def _bytes(values: Values) -> bytes:
    """Encode entries in the byte order of the file, little-endian."""
    return values.astype("<u8").tobytes()
