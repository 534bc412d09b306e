"""The fast path: serving a request without waiting, if its tables and data are in memory.

On the fast path no other task runs between the lookup and the read or write, so it needs neither a
lock nor an epoch (`Epochs`).  If a slice (a part of a table) or data is not in memory, an entry is
bad, or the host fails, the fast path gives up.  The caller then starts the request again on the
slow path, which waits, or reports the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.disk.datapath.fastallocation import FastAllocation
from qedfuse.disk.datapath.readtables import ReadTables, SeekTables
from qedfuse.disk.lookup.flattenedbacking import MIXED, ZEROS, data_location
from qedfuse.ondisk.constants import ZERO

if TYPE_CHECKING:
    from array import array

    from qedfuse.disk.datapath.tablewriter import TableWriter
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.datapath.zerofill import ZeroFill
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.slices import Slice
    from qedfuse.disk.space.epochs import Epochs
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import Buffer, HostFile

_MAX_READ_BYTES: Final = 1 << 20
"""Maximum bytes of one read on the fast path, and the length of its buffer."""
_ZEROS: Final = memoryview(bytes(_MAX_READ_BYTES))


class FastPath:
    """Reads and writes that do not wait."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        writeback: MetadataWriteback,
        space: SpaceManager,
        needcheck: NeedCheck,
        table_writer: TableWriter,
        write_path: WritePath,
        zero_fill: ZeroFill,
    ) -> None:
        """Serve requests for ``layer``, the top of ``chain``."""
        self._layer = layer
        self._writeback = writeback
        self._flattened = chain.flattened
        self._lacks_base = chain.lacks_base
        self._files = [one.file for one in chain.layers]
        self._file_reads = chain.file_reads
        self._file = layer.file
        self._try_write_file = layer.file.try_write
        # One buffer for all reads: Python would fill each new one with zeros, which takes as long
        # as the read.
        self._buffer = memoryview(bytearray(_MAX_READ_BYTES))
        self._allocation = FastAllocation(
            *(chain, layer, space, needcheck, table_writer, write_path, zero_fill),
            self._buffer,
        )
        self._bits = layer.geometry.cluster_bits
        self._cluster_size = layer.geometry.cluster_size
        self._cluster_mask = layer.geometry.cluster_mask
        self._slice_bits = layer.tables.slice_entries.bit_length() - 1
        self._slice_mask = layer.tables.slice_entries - 1

    def try_read(self, start: int, length: int) -> memoryview | None:
        """Read a guest range; return None if that would block or fail.

        Returns None also if the range is empty, is longer than `_MAX_READ_BYTES`, does not lie
        within one slice, or ends past the end of the disk.  The returned view is valid until the
        next read or write of the disk on the fast path.
        """
        if length > _MAX_READ_BYTES:
            return None
        location = self.locate(start, length)
        if location is not None:
            file, offset = location
            view = self._buffer[:length]
            if not file.try_read(offset, view):
                return None
            self._file_reads.count(file, length)
            return view
        return self._gather(start, start + length)

    def tables_for_reads(self, epochs: Epochs) -> ReadTables:
        """Return what ``_readview.c`` needs for reads; ``epochs`` counts the disk's requests."""
        has_base = self._lacks_base or self._flattened is not None
        table_bits = self._layer.geometry.entries.bit_length() - 1
        return ReadTables(
            self._layer,
            self._layer.slice_keys,
            self._layer.tables.get,
            None if self._flattened is None else self._flattened.store_key,
            tuple(file.page_source for file in self._files),
            self._bits,
            self._slice_bits,
            epochs,
            self._file_reads.cells,
            seeks=None if has_base else SeekTables(self._layer.tables.cache_key, table_bits),
        )

    def locate(self, start: int, length: int) -> tuple[HostFile, int] | None:
        """Return the file and the file offset of a guest range that is stored as one run.

        Returns None if the range is empty, is not one run of data within one slice, ends past the
        end of the disk, or needs a slice that is not in memory or has a bad entry.  The result is
        valid until the caller leaves its epoch (`Epochs`); without an epoch, until it awaits
        something.
        """
        end = start + length
        if not length or end > self._layer.header.image_size:
            return None
        first = start >> self._bits
        slice_ = self._layer.cached_slice(first >> self._slice_bits)
        if slice_ is None or slice_.bad is not None:
            return None
        index = first & self._slice_mask
        last = index + ((end - 1) >> self._bits) - first
        value = slice_.entries[index]
        if last > index and not self._is_run(slice_.entries, index, last):
            return None
        if value > ZERO:
            return self._file, value + (start & self._cluster_mask)
        if value or self._flattened is None:
            return None
        return self._locate_in_backing(self._flattened, start, last - index)

    def _locate_in_backing(
        self, flattened: FlattenedBacking, start: int, more: int
    ) -> tuple[HostFile, int] | None:
        """Locate a range that is unallocated in the top image; see `locate`.

        ``more`` is the number of clusters in the range after the first one, all in one slice.
        """
        cluster = start >> self._bits
        codes = flattened.cached(cluster >> self._slice_bits)
        if codes is None:
            return None
        index = cluster & self._slice_mask
        code = codes[index]
        # The codes of contiguous clusters of one file differ by the cluster size, as entries do.
        if code <= ZEROS or (more and not self._is_run(codes, index, index + more)):
            return None
        depth, value = data_location(code)
        return self._files[depth], value + (start & self._cluster_mask)

    def try_write(self, start: int, data: Buffer) -> bool:
        """Write ``data`` at a guest offset; return False if that would block or fail.

        Returns False also if ``data`` is empty, does not lie within one slice, or ends past the
        end of the disk.  After False a part of the range may have been written, so the caller
        must write the whole range again on the slow path.
        """
        end = start + len(data)
        if not start < end <= self._layer.header.image_size:
            return False
        first = start >> self._bits
        slice_ = self._layer.cached_slice(first >> self._slice_bits)
        index = first & self._slice_mask
        last = index + ((end - 1) >> self._bits) - first
        if slice_ is None or slice_.bad is not None or last > self._slice_mask:
            return False
        value = slice_.entries[index]
        if value <= ZERO or self._run_end(slice_.entries, index, last) <= last:
            return self._write_runs(slice_, start, memoryview(data))
        if not self._try_write_file(value + (start & self._cluster_mask), data):
            return False
        self._writeback.note_write()
        return True

    def _write_runs(self, slice_: Slice, start: int, data: memoryview) -> bool:
        """Write a range within one slice, run by run; see `try_write` for the result."""
        end = start + len(data)
        last = ((end - 1) >> self._bits) & self._slice_mask
        while data:
            first = start >> self._bits
            index = first & self._slice_mask
            until = self._run_end(slice_.entries, index, last)
            segment = data[: ((first + until - index) << self._bits) - start]
            value = slice_.entries[index]
            if value <= ZERO:
                done = self._allocation.try_write(slice_, first, until - index, start, segment)
            else:
                done = self._try_write_file(value + (start & self._cluster_mask), segment)
                self._writeback.note_write()
            if not done:
                return False
            start += len(segment)
            data = data[len(segment) :]
        return True

    def _is_run(self, entries: array[int], first: int, last: int) -> bool:
        """Return whether the entries ``first`` to ``last``, inclusive, are one run in one slice."""
        return last <= self._slice_mask and self._run_end(entries, first, last) > last

    def _run_end(self, entries: array[int], first: int, last: int) -> int:
        """Return the index past the run of entries that begins at ``first``, at most ``last + 1``.

        The entries of a run refer to contiguous clusters, or are all unallocated, or all zero
        clusters.
        """
        value = entries[first]
        size = self._cluster_size if value > ZERO else 0
        for at in range(first + 1, last + 1):
            value += size
            if entries[at] != value:
                return at
        return last + 1

    def _gather(self, start: int, end: int) -> memoryview | None:
        """Read a range within one slice, run by run; None as in `try_read`."""
        if not start < end <= self._layer.header.image_size:
            return None
        first, last = start >> self._bits, (end - 1) >> self._bits
        slice_ = self._layer.cached_slice(first >> self._slice_bits)
        crosses_slices = (first ^ last) >> self._slice_bits
        if slice_ is None or slice_.bad is not None or crosses_slices:
            return None
        runs = self._runs(slice_.entries, start, end)
        if runs is None:
            return None
        if len(runs) == 1 and runs[0][0] < 0:
            return _ZEROS[: end - start]
        whole = self._buffer[: end - start]
        at = 0
        for depth, offset, length in runs:
            view = whole[at : at + length]
            if depth < 0:
                view[:] = _ZEROS[:length]
            elif self._files[depth].try_read(offset, view):
                self._file_reads.count(self._files[depth], length)
            else:
                return None
            at += length
        return whole

    def _runs(self, entries: array[int], start: int, end: int) -> list[list[int]] | None:
        """Return the runs of a guest range within one slice; None if `FastPath` must give up.

        It gives up at an unallocated cluster if the base was not opened, or if the cluster's code
        in `FlattenedBacking` is not in memory or is `MIXED`.

        Each run is a list of its depth in the chain (-1 for zeros), its file offset and its length.
        """
        first = start >> self._bits
        codes = None
        runs: list[list[int]] = []
        at = start
        for number in range(first, ((end - 1) >> self._bits) + 1):
            stop = min(end, (number + 1) << self._bits)
            value = entries[number & self._slice_mask]
            depth = 0
            if value <= ZERO:
                if value != ZERO and self._lacks_base:
                    return None
                depth = -1
                if value != ZERO and self._flattened is not None:
                    codes = codes or self._flattened.cached(first >> self._slice_bits)
                    code = MIXED if codes is None else codes[number & self._slice_mask]
                    if code == MIXED:
                        return None
                    if code != ZEROS:
                        depth, value = data_location(code)
            offset = value + (at & self._cluster_mask) if depth >= 0 else 0
            if runs and runs[-1][0] == depth and (depth < 0 or sum(runs[-1][1:]) == offset):
                runs[-1][2] += stop - at
            else:
                runs.append([depth, offset, stop - at])
            at = stop
        return runs
