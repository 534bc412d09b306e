"""The part of the fast path that writes to clusters that are not allocated yet.

`FastAllocation` chooses clusters, writes the data to them and changes their entries without an
await, so no other task runs in between.  The slow path must carry out the write unless all of these
conditions are met:

- The L2 table exists, the slice with the entries is in memory, and host space for the slice's
  write-back is reserved.
- NEED_CHECK is set.
- No task holds or waits for the range lock of the clusters (`WritePath.allocation_lock`).
- The dirty slices fit in their budget (`TableWriter.is_within_budget`).
- The allocator finds one run for all the clusters.
- At least one cluster of the file is free, or `DirectReclaim.should_reclaim` returns False.
- In an image with a base, the write covers whole clusters, or it goes to one cluster only, whose
  code in `FlattenedBacking` is in memory and is not `MIXED`.
- If the new clusters must be written as a whole, they fit in the fast path's buffer.
- Reading the base, growing the file and writing the data would not block.

The order is the same as on the slow path (`WritePath`): first the data is written to the file, and
after that the entry that makes the data visible is changed in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.lookup.flattenedbacking import MIXED, ZEROS, data_location
from qedfuse.ondisk.constants import UNALLOCATED

if TYPE_CHECKING:
    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.datapath.zerofill import ZeroFill
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.hostio.hostfile import Buffer


class FastAllocation:
    """Allocates clusters and writes to them, without waiting."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        space: SpaceManager,
        needcheck: NeedCheck,
        table_writer: TableWriter,
        write_path: WritePath,
        zero_fill: ZeroFill,
        buffer: memoryview,
    ) -> None:
        """Allocate for ``layer``, the top of ``chain``.

        The content of new clusters is assembled in ``buffer``, which each `try_write` may
        overwrite.
        """
        self._layer = layer
        self._flattened = chain.flattened
        self._files = [one.file for one in chain.layers]
        self._space = space
        self._needcheck = needcheck
        self._is_within_budget = table_writer.is_within_budget
        self._is_unlocked = write_path.allocation_lock.is_free
        self._zero_fill = zero_fill
        self._buffer = buffer
        self._bits = layer.geometry.cluster_bits
        self._cluster_size = layer.geometry.cluster_size

    def try_write(self, slice_: Slice, first: int, count: int, start: int, data: Buffer) -> bool:
        """Allocate clusters and write ``data``; return False if that would block or fail.

        If it returns False, no entry has changed and no cluster is allocated.

        Args:
            slice_: The slice with the entries of the guest clusters, which must be all
                unallocated or all zero clusters.
            first: Number of the first guest cluster.
            count: Number of guest clusters.
            start: Guest offset of ``data``.
            data: The bytes to write; they must touch each of the clusters.
        """
        tables = self._layer.tables
        index = first & (tables.slice_entries - 1)
        run_start = first << self._bits
        length = count << self._bits
        if not (
            slice_ is not tables.empty_slice
            and tables.is_reserved(slice_)
            and self._needcheck.is_set
            and self._is_unlocked(run_start, run_start + length)
            and self._is_within_budget()
        ):
            return False
        # Read the base, and find out whether the write would block, before the allocation.  After a
        # later failure the run would have to be released.  A released run no longer counts as never
        # written, so its next owner would have to write all of it.  `_fill` may still fail: a run
        # that was written before must be written as a whole, which can be more bytes than were
        # checked.
        base_bytes = (
            self._read_base(slice_.entries[index], run_start, length) if len(data) < length else 0
        )
        if base_bytes is None or not self._layer.file.can_write_inline(
            length if base_bytes else len(data)
        ):
            return False
        run = self._space.try_allocate(count)
        if run is None:
            return False
        if not self._fill(run, start - run_start, data, base_bytes):
            self._space.release(run)
            return False
        offset = run.offset
        for at in range(index, index + count):
            tables.set(slice_, at, offset)
            offset += self._cluster_size
        self._needcheck.note_change()
        return True

    def _read_base(self, entry: int, start: int, length: int) -> int | None:
        """Read what the base has for guest clusters into the buffer; return the number of bytes.

        Returns None if the read would block or fail, or if the slow path must assemble the data.

        Args:
            entry: The value of all entries of the clusters.
            start: Guest offset of the clusters.
            length: Length of the clusters in bytes.
        """
        if entry != UNALLOCATED or self._flattened is None:
            return 0
        # If there are several clusters, the slow path looks up what the base has for them.
        number = start >> self._bits
        entries = self._layer.tables.slice_entries
        codes = self._flattened.cached(number // entries) if length == self._cluster_size else None
        code = MIXED if codes is None else codes[number & (entries - 1)]
        if code <= ZEROS:
            return None if code == MIXED else 0
        # Do not copy bytes of the base that lie past the end of the disk: if another program later
        # grew the disk without zeroing them, the guest would read them.
        base_bytes = min(length, self._layer.size - start)
        depth, offset = data_location(code)
        if length > len(self._buffer):
            return None
        return (
            base_bytes if self._files[depth].try_read(offset, self._buffer[:base_bytes]) else None
        )

    def _fill(self, run: Run, offset_in_run: int, data: Buffer, base_bytes: int) -> bool:
        """Fill a run with ``data`` and the bytes around it; False if that would block or fail.

        After False, the content of the run is undefined.  ``base_bytes`` is the number of bytes at
        the beginning of the buffer that are data of the base.  The rest of the run becomes zeros.
        """
        write = self._layer.file.try_write
        if len(data) == run.length:
            return write(run.offset, data)
        if run.never_written and not base_bytes:
            if not write(run.offset + offset_in_run, data):
                return False
            self._zero_fill.fill_rest(run, offset_in_run, len(data))
            return True
        if run.length > len(self._buffer):
            return False
        whole = self._buffer[: run.length]
        whole[base_bytes:] = bytes(run.length - base_bytes)
        whole[offset_in_run : offset_in_run + len(data)] = data
        return write(run.offset, whole)
