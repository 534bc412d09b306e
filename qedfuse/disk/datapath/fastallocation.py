"""The part of the fast path that writes to clusters that are not allocated yet.

`FastAllocation` chooses clusters, writes the data to them and changes their entries without an
await, that is, atomically with respect to other tasks.  It can do so if all the conditions
below are met, which is usual:

- The L2 table exists, the slice (part of the table) with the entries is in memory, and host space
  for the slice's write-back is reserved.
- NEED_CHECK is set.
- No task holds the range lock of the clusters (`WritePath.allocation_lock`), and none waits for it.
- The dirty slices fit in their budget (`TableWriter.is_within_budget`).
- The allocator finds one run for all the clusters.
- At least one cluster of the file is free, or `DirectReclaim.should_reclaim` returns False.
  Otherwise the slow path reclaims clusters before the file grows.
- The write needs no data of the base: the image has no base, the clusters are zero clusters, or
  the data covers the clusters completely.  Or the write goes to one cluster only, the code in
  `FlattenedBacking` that says where a base stores this cluster is in memory, and the code is not
  `MIXED` (the layers must be searched).
- If the new clusters must be written as a whole, to fill them around the data, they fit in the
  fast path's buffer.
- Reading the base, growing the file and writing the data would not block.

If a condition is not met, the slow path must carry out the write.

The order is the same as on the slow path (`WritePath`): first the data is written to the file,
and after that the entry that makes the data visible is changed in memory.
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
        overwrite.  A run that is longer than the buffer and must be assembled is left to the slow
        path.
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
        """Allocate clusters and write ``data``; return False if that would block or fails.

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
        # Read the base, and find out whether the write would block, before the allocation.
        # If one of these steps failed after the allocation, the run would have to be released.
        # A released run no longer counts as never written, so its next owner would have to
        # write all of it.  `_fill` may still fail: if the run was written before, `_fill` writes
        # all of it, which can be more bytes than were checked.  Whether the run was written before
        # is known only after the allocation.
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
        """Read what the base has for guest clusters into the buffer.

        ``start`` is the guest offset of the clusters, ``length`` their length in bytes, and
        ``entry`` the value that all their entries have.

        Returns:
            How many bytes were read.  The caller must fill the rest of the clusters with zeros,
            except where the guest's data goes.  None if the read would block or fails, or if the
            slow path must assemble the data.
        """
        if entry != UNALLOCATED or self._flattened is None:
            return 0
        # If data of the base may be needed for several clusters, leave the write to the slow path.
        number = start >> self._bits
        entries = self._layer.tables.slice_entries
        codes = self._flattened.cached(number // entries) if length == self._cluster_size else None
        code = MIXED if codes is None else codes[number & (entries - 1)]
        if code <= ZEROS:
            return None if code == MIXED else 0
        # Do not copy bytes of the base that lie past the end of the disk.  If another program
        # later grew the disk without zeroing the copied bytes, the guest would read them.
        base_bytes = min(length, self._layer.size - start)
        depth, offset = data_location(code)
        if length > len(self._buffer):
            return None
        return (
            base_bytes if self._files[depth].try_read(offset, self._buffer[:base_bytes]) else None
        )

    def _fill(self, run: Run, offset_in_run: int, data: Buffer, base_bytes: int) -> bool:
        """Fill a run with ``data`` and the bytes around it; False if that would block or fails.

        If it returns False, the content of the run is undefined.

        Args:
            run: The run of new clusters.
            offset_in_run: Offset in bytes of ``data`` within the run.
            data: The guest's data.
            base_bytes: How many bytes at the beginning of the buffer are data of the base.  The
                run gets these bytes, followed by zeros up to its end, and ``data`` over both.
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
