"""The layers of a chain: files that are seen as disks.

A lookup returns the extents by which one layer stores a range of the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.lookup.slices import L1, L2
from qedfuse.disk.lookup.tablecache import SliceStore, TableCache
from qedfuse.disk.lookup.tableregistry import TableRegistry
from qedfuse.ondisk.constants import UNALLOCATED, ZERO
from qedfuse.ondisk.table import runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


_MAX_REMEMBERED_KEYS: Final = 4096
"""Maximum number of keys in `QedLayer.slice_keys`."""


class Layer(Protocol):
    """A file of the chain, seen as a disk.

    Attributes:
        file: The open file.
    """

    file: HostFile

    @property
    def size(self) -> int:
        """The size in bytes of the disk that this layer describes."""

    async def lookup(self, start: int, length: int) -> list[Extent]:
        """Return how this layer, without its base, stores a range that lies within its disk.

        The extents have depth 0, whatever the depth of this layer in the chain is.

        Raises:
            HostError: The host cannot read a table.
        """


class RawLayer:
    """A raw image: each byte of the disk is data, at the same offset in the file."""

    def __init__(self, file: HostFile) -> None:
        """Show the bytes of ``file`` as the disk."""
        self.file = file
        self.size = file.size()

    async def lookup(self, start: int, length: int) -> list[Extent]:
        """Return one extent of data for the range."""
        return [Extent(Kind.DATA, start, length, start)]


class QedLayer:
    """A QED image: two levels of tables.

    Attributes:
        file: The image file.
        header: The header of the image.  Of its values only the size of the disk and the offset of
            the L1 table are current; use `HeaderStore.value` for the others.
        geometry: The geometry of the image, which never changes.
        registry: Where the L2 tables lie, and which entries are valid.
        tables: The table cache of the image.
        slice_keys: The key of each slice in the table cache, by the number of the slice (see
            `cached_slice`); None for a missing L2 table.  The dictionary itself is never replaced.
    """

    def __init__(self, file: HostFile, header: Header, store: SliceStore) -> None:
        """Make the layer of the image in ``file``; ``header`` was read from it.

        The caller must call `scan_l1` before it uses the layer.
        """
        self.file = file
        self.header = header
        self.geometry = header.geometry
        self.registry = TableRegistry(file, header)
        self.tables = TableCache(file, header.geometry, store, self.registry.find_bad)
        self.slice_keys: dict[int, tuple[int, int] | None] = {}

    @property
    def size(self) -> int:
        """The size in bytes of the disk that this image describes."""
        return self.header.image_size

    @property
    def l2_tables(self) -> NDArray[np.uint64]:
        """The file offsets of the L2 tables, ascending; see `TableRegistry.l2_tables`."""
        return self.registry.l2_tables

    @property
    def damaged(self) -> bool:
        """Whether damage was found since the image was opened; if so, NEED_CHECK is not cleared."""
        return self.registry.damaged

    def mark_damaged(self) -> None:
        """Record that the image is damaged: its tables contradict each other or the file."""
        self.registry.mark_damaged()

    def set_header(self, header: Header) -> None:
        """Replace the header by the durable one, after a change of the disk's size."""
        self.header = header
        self.registry.set_header(header)

    async def scan_l1(self) -> None:
        """Find all L2 tables; see `TableRegistry.scan`.

        Raises:
            CorruptImageError: Two L2 tables overlap and the image is open for writing.
            HostError: The host cannot read the L1 table.
        """
        await self.registry.scan()

    def add_table(self, l1_index: int, offset: int) -> None:
        """Record that L1 entry ``l1_index``, which was 0, refers to an L2 table at ``offset``."""
        self.registry.add(l1_index, offset)
        self.slice_keys.clear()

    def move_table(self, old: int, new: int) -> None:
        """Record that an L2 table was copied from file offset ``old`` to ``new``.

        The caller must ensure that no slice of the table is dirty or pinned.
        """
        self.registry.move(old, new)
        self.tables.move(old, new, self.geometry.table_bytes)
        self.slice_keys.clear()

    def drop_table(self, l1_index: int, offset: int) -> None:
        """Record that L1 entry ``l1_index`` no longer refers to the L2 table at ``offset``.

        The caller must ensure that no slice of the table is dirty or pinned.
        """
        self.registry.remove(l1_index, offset)
        self.tables.forget(offset, self.geometry.table_bytes)
        self.slice_keys.clear()

    async def table_at(self, l1_index: int) -> tuple[int, str]:
        """Return the file offset of the L2 table of an L1 entry; 0 if the entry is 0 or bad.

        The second value is a message about a bad entry, and empty if the entry is valid.

        Raises:
            HostError: The host cannot read the L1 table.
        """
        l1_offset = self.header.l1_table_offset
        slice_ = self.tables.cached(l1_offset, l1_index)
        if slice_ is None:
            slice_ = await self.tables.load(l1_offset, l1_index, L1)
        index = l1_index % self.tables.slice_entries
        value = slice_.entries[index]
        if slice_.bad is not None and slice_.bad[index]:
            return 0, self.registry.explain(L1, f"L1 entry {l1_index}", value)
        return value, ""

    def cached_slice(self, number: int) -> Slice | None:
        """Return a slice of L2 entries; ``number`` counts slices from the disk's beginning.

        Returns `TableCache.empty_slice` if the L2 table does not exist.  Returns None if the slice
        or its L1 entry is not in memory.  May also return None if the slice of the L1 table that
        has this L1 entry contains a bad entry.
        """
        key = self.slice_keys.get(number)
        if key is None:
            if number in self.slice_keys:
                return self.tables.empty_slice
            first = number * self.tables.slice_entries
            l1_index, index = divmod(first, self.geometry.entries)
            slice_ = self.tables.cached(self.header.l1_table_offset, l1_index)
            if slice_ is None or slice_.bad is not None:
                return None
            table = slice_.entries[l1_index % self.tables.slice_entries]
            if len(self.slice_keys) >= _MAX_REMEMBERED_KEYS:
                self.slice_keys.clear()
            if not table:
                self.slice_keys[number] = None
                return self.tables.empty_slice
            key = self.slice_keys[number] = self.tables.key(table, index)
        return self.tables.get(key)

    def skip_missing_tables(self, l1_index: int) -> int:
        """Return the index of the first L1 entry at or past ``l1_index`` that is not known to be 0.

        If there is none, the result is past the last entry of the disk.
        """
        end, step = self.geometry.l1_used(self.header.image_size), self.tables.slice_entries
        while l1_index < end:
            slice_ = self.tables.cached(self.header.l1_table_offset, l1_index)
            if slice_ is None:
                return l1_index
            used = np.frombuffer(slice_.entries, np.uint64)[l1_index % step :] != UNALLOCATED
            first = int(used.argmax())
            if used[first]:
                return l1_index + first
            l1_index += len(used)
        return l1_index

    async def lookup(self, start: int, length: int) -> list[Extent]:
        """Return how this image, without its base, stores a range of its disk.

        The range may reach past the end of the disk, as far as the tables have entries.  The
        extents have depth 0.

        Raises:
            HostError: The host cannot read a table.
        """
        result: list[Extent] = []
        end = start + length
        geometry = self.geometry
        while start < end:
            l1_index = geometry.l1_index(start)
            table, reason = await self.table_at(l1_index)
            last = min(end, (l1_index + 1) * geometry.table_span)
            if not table:
                kind = Kind.BAD if reason else Kind.UNALLOCATED
                result.append(Extent(kind, start, last - start, reason=reason))
                start = last
                continue
            index = geometry.l2_index(start)
            slice_ = self.tables.cached(table, index)
            if slice_ is None:
                slice_ = await self.tables.load(table, index, L2)
            in_slice = index % self.tables.slice_entries
            slice_start = geometry.floor(start) - in_slice * geometry.cluster_size
            slice_end = slice_start + len(slice_.entries) * geometry.cluster_size
            last = min(last, slice_end)
            result.extend(self._in_slice(slice_, slice_start, start, last, l1_index))
            start = last
        return result

    def _in_slice(
        self, slice_: Slice, slice_start: int, start: int, end: int, l1_index: int
    ) -> Iterator[Extent]:
        """Yield the extents from ``start`` to ``end``, which lie within one slice of an L2 table.

        ``slice_start`` is the guest offset of the slice's first cluster; ``l1_index`` is for
        messages.
        """
        geometry = self.geometry
        size = geometry.cluster_size
        first = (start - slice_start) >> geometry.cluster_bits
        last = geometry.clusters(end - slice_start)
        found = runs(slice_.entries, first, last, size)
        if slice_.bad is not None:
            # A run could contain bad entries and valid ones, so take each entry by itself.
            found = ((at, 1, slice_.entries[at]) for at in range(first, last))
        for index, count, value in found:
            run_start = slice_start + index * size
            here = max(start, run_start)
            stop = min(end, run_start + count * size)
            if value == UNALLOCATED:
                yield Extent(Kind.UNALLOCATED, here, stop - here)
            elif value == ZERO:
                yield Extent(Kind.ZERO, here, stop - here)
            elif slice_.bad is not None and slice_.bad[index]:
                entry = f"L1 entry {l1_index}: L2 entry {geometry.l2_index(run_start)}"
                reason = self.registry.explain(L2, entry, value)
                yield Extent(Kind.BAD, here, stop - here, reason=reason)
            else:
                yield from self._data(here, stop, value + here - run_start)

    def _data(self, start: int, stop: int, file_offset: int) -> Iterator[Extent]:
        """Yield the extents of a guest range whose data begins at ``file_offset`` in the file.

        If the image is open for reading only, data past the end of the file is a bad extent.  If it
        is open for writing, `TableRegistry.find_bad` has already found such entries.
        """
        length = stop - start
        if not self.file.writable:
            present = self.file.size() - file_offset
            if present < length:
                present = max(0, present)
                if present:
                    yield Extent(Kind.DATA, start, present, file_offset)
                reason = (
                    f"{self.file.name}: data at {file_offset}: the file ends at "
                    f"{self.file.size()}, expected at least {file_offset + length} bytes"
                )
                yield Extent(Kind.BAD, start + present, length - present, reason=reason)
                return
        yield Extent(Kind.DATA, start, length, file_offset)
