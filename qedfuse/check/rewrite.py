"""Changes to an image under repair, in an order that a crash cannot spoil."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.disk.state.freelistreader import backing_name_covers_descriptor
from qedfuse.disk.state.freelistwriter import erase_descriptor
from qedfuse.errors import NoSpaceError
from qedfuse.ondisk.constants import ENTRY_BYTES, HEADER_BYTES, MAX_OFFSET
from qedfuse.ondisk.freelist import DESCRIPTOR_BYTES, DESCRIPTOR_OFFSET
from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Values
    from qedfuse.ondisk.header import Header

    Save = Callable[[int, bytes, bytes], None]

_COPY_BYTES: Final = 1 << 20


class Rewriter:
    """Writes to an image: new things at the end of the file, entries in place.

    Attributes:
        end: The file's length in bytes, a whole number of clusters.
        writes: Whether anything is written at all; see `DryRunRewriter`.
    """

    changes_file = True

    def __init__(self, file: HostFile, header: Header) -> None:
        """Prepare to change ``file``."""
        self._file = file
        self._header = header
        self.end = self._representable(header.geometry.ceil(file.size()))
        self._avoided = np.empty(0, np.uint64)
        self._has_pending = False

    async def write_need_check(self, *, need_check: bool) -> None:
        """Set or clear NEED_CHECK, durably, after everything before is durable.

        A list of free clusters is dropped at the same time: it is not kept up to date.
        """
        await self._file.datasync()
        await self._file.pwrite(0, self._built_header(need_check=need_check))
        await self._file.datasync()
        if self._header.free_list:
            await erase_descriptor(self._file, self._header)

    def _built_header(self, *, need_check: bool) -> bytes:
        """Build the header with NEED_CHECK set or cleared."""
        header = self._header.with_need_check(value=need_check).without_stale_autoclear()
        return build_header(header.with_free_list(value=False))

    async def extend(self, end: int) -> None:
        """Make the file at least ``end`` bytes long; what is added reads as zeros."""
        self.end = max(self.end, self._representable(end))
        if self._file.size() < self.end:
            await self._file.truncate(self.end)
            await self._file.datasync()

    async def copy(self, start: int, length: int) -> int:
        """Copy a range of the file to its end, holes as holes; give the copy's file offset."""
        target = self._allocate(length)
        await self._file.truncate(self.end)
        at = 0
        while at < length and (data := await self._file.next_data(start + at)) is not None:
            at = max(at, data - start)
            if at < length:
                part = await self._file.pread(start + at, min(_COPY_BYTES, length - at))
                if any(part):
                    await self._file.pwrite(target + at, part)
                at += _COPY_BYTES
        return target

    async def new_table(self, value: int, count: int) -> int:
        """Add a table whose first ``count`` entries have a value; give its file offset."""
        target = self._allocate(self._header.geometry.table_bytes)
        await self._file.truncate(self.end)
        await self.fill(target, count, value)
        return target

    async def fill(self, start: int, count: int, value: int) -> None:
        """Give ``count`` entries from a file offset on a value; they are zeros until now."""
        at_once = _COPY_BYTES // ENTRY_BYTES
        piece = value.to_bytes(ENTRY_BYTES, "little") * min(at_once, count)
        while count > 0 and value:
            self._has_pending = True
            await self._file.pwrite(start, piece[: count * ENTRY_BYTES])
            start += len(piece)
            count -= at_once

    async def replace_entries(self, offset: int, old: Values, new: Values) -> None:
        """Write the entries that have changed, once what they point to is durable."""
        where = np.flatnonzero(old != new)
        if len(where):
            begin, end = int(where[0]), int(where[-1]) + 1
            await self.overwrite(
                offset + begin * ENTRY_BYTES, _bytes(old[begin:end]), _bytes(new[begin:end])
            )

    async def overwrite(self, offset: int, _old: bytes, new: bytes) -> None:
        """Write a piece of a table, after everything before is durable."""
        await self._file.datasync()
        await self._file.pwrite(offset, new)

    async def clear_entries(self, offset: int, new: Values) -> None:
        """Write entries that refer to nothing, so that nothing has to be durable before."""
        self._has_pending = True
        await self._file.pwrite(offset, _bytes(new))

    async def sync_pending(self) -> None:
        """Make durable what was cleared or filled, before the file gets longer."""
        if self._has_pending:
            await self._file.datasync()
            self._has_pending = False

    def set_avoided(self, clusters: Values) -> None:
        """Never put anything new into some clusters past the end: their file offsets, sorted."""
        self._avoided = clusters

    def _allocate(self, length: int) -> int:
        """Choose the file offset of something new of so many bytes."""
        target = self.end
        while True:
            place = int(np.searchsorted(self._avoided, target))
            if place == len(self._avoided) or self._avoided[place] >= target + length:
                break
            target = int(self._avoided[place]) + self._header.cluster_size
        self.end = self._representable(target + length)
        return target

    def _representable(self, end: int) -> int:
        """Let an end of the file through that the host can count up to.

        Raises:
            NoSpaceError: It cannot.
        """
        if end > MAX_OFFSET:
            msg = f"{self._file.name}: file size: found {end}, expected at most {MAX_OFFSET}"
            raise NoSpaceError(msg)
        return end


class DryRunRewriter(Rewriter):
    """Writes nothing: adds up what a repair would write, and has saved what it would change.

    Attributes:
        written: Bytes so far, without the holes of what would be copied.
    """

    changes_file = False

    def __init__(self, file: HostFile, header: Header, save: Save | None = None) -> None:
        """Draft a repair of ``file``; ``save`` gets what each piece is and is to be."""
        super().__init__(file, header)
        self.written = 0
        self._last_copy = (0, 0, 0)
        self._size = file.size()
        self._save = save or (lambda _offset, _old, _new: None)

    async def write_need_check(self, *, need_check: bool) -> None:  # noqa: ARG002  it is cleared in the end
        """Save the header, and the descriptor of a list of free clusters, which is erased."""
        old = bytes(await self._file.pread(0, HEADER_BYTES))
        self._save(0, old, self._built_header(need_check=False))
        if self._header.free_list and not backing_name_covers_descriptor(self._header):
            old = bytes(await self._file.pread(DESCRIPTOR_OFFSET, DESCRIPTOR_BYTES))
            self._save(DESCRIPTOR_OFFSET, old, bytes(len(old)))

    async def extend(self, end: int) -> None:
        """Note that the file would be longer."""
        self.end = max(self.end, self._representable(end))

    async def copy(self, start: int, length: int) -> int:
        """Count what would be copied."""
        # Where one cluster has thousands of owners, it is looked at once.
        if self._last_copy[:2] != (start, length):
            self._last_copy = (start, length, await self._data_bytes(start, start + length))
        self.written += self._last_copy[2]
        return self._allocate(length)

    async def new_table(self, _value: int, _count: int) -> int:
        """Count a table."""
        length = self._header.geometry.table_bytes
        self.written += length
        return self._allocate(length)

    async def fill(self, _start: int, count: int, value: int) -> None:
        """Count entries."""
        self.written += count * ENTRY_BYTES if value else 0

    async def clear_entries(self, _offset: int, _new: Values) -> None:
        """Leave entries as they are; they are counted and saved when their slice is repaired."""

    async def overwrite(self, offset: int, old: bytes, new: bytes) -> None:
        """Save and count a piece of a table; a new one has nothing that could be saved."""
        self.written += len(new)
        if offset < self._size:
            self._save(offset, old, new)

    async def _data_bytes(self, start: int, end: int) -> int:
        """Count the bytes of a range of the file that are no holes."""
        total = 0
        while start < end:
            await trio.lowlevel.checkpoint()
            data = await self._file.next_data(start)
            if data is None or data >= end:
                break
            start = min(end, await self._file.next_hole(data) or end)
            total += start - data
        return total


def _bytes(values: Values) -> bytes:
    """Encode entries as they stand in the file."""
    return values.astype("<u8").tobytes()
