"""The short way of a request: tables and data are in memory, so nothing has to be waited for.

Most requests are like that, and going the long way, by extents and tasks, would cost them
several times what the host's file costs.  Nobody else runs between looking up where the
bytes are and reading or writing them, so neither locks nor `Epochs` are needed.  Whatever
is not plain sailing (a table or data not in memory, a bad entry, a failing host) is left
to the long way, which begins anew and says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.disk.datapath.fastallocation import FastAllocation
from qedfuse.disk.lookup.flattenedbacking import MIXED, ZEROS, place
from qedfuse.ondisk.constants import ZERO

if TYPE_CHECKING:
    from array import array

    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.flattenedbacking import FlattenedBacking
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.tablecache import Slice
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.disk.writeback.metadata import MetadataWriteback
    from qedfuse.hostio.hostfile import Buffer, HostFile

_ZEROS: Final = memoryview(bytes(1 << 20))
_SHORT: Final = 1 << 20
"""Longest request that goes the short way, in bytes: as long as the kernel's."""


_MOST_SLICES: Final = 64
"""Pieces of tables that are looked through at once; then others have a turn."""


class FastPath:
    """Reads and writes that need no waiting."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        writeback: MetadataWriteback,
        space: SpaceManager,
        needcheck: NeedCheck,
        write_path: WritePath,
    ) -> None:
        """Serve requests to ``layer``, the top of ``chain``."""
        self._layer = layer
        self._writeback = writeback
        self._below = chain.below
        self._lacks_base = chain.lacks_base
        self._files = [one.file for one in chain.layers]
        self._file = layer.file
        self._write = layer.file.try_write
        # To make new memory for each request, and to fill it with zeros first, would cost
        # as much as to read into it.
        self._buffer = memoryview(bytearray(_SHORT))
        self._new = FastAllocation(chain, layer, space, needcheck, write_path, self._buffer)
        self._empty_slice = layer.tables.empty_slice
        self._bits = layer.geometry.cluster_bits
        self._size = layer.geometry.cluster_size
        self._entries = layer.geometry.entries
        self._cluster_mask = layer.geometry.cluster_mask
        self._slice_bits = layer.tables.slice_entries.bit_length() - 1
        self._slice_mask = layer.tables.slice_entries - 1

    def read(self, start: int, length: int) -> memoryview | None:
        """Read a range; None if it has to go the long way.

        What is returned holds until the next call.
        """
        if length > _SHORT:
            return None
        place = self.place(start, length)
        if place is not None:
            view = self._buffer[:length]
            return view if place[0].try_read(place[1], view) else None
        return self._gather(start, start + length)

    def place(self, start: int, length: int) -> tuple[HostFile, int] | None:
        """Tell which file holds a range, and at which offset; None if not one does in one run.

        What is said holds until anybody else runs.
        """
        end = start + length
        if not length or end > self._layer.header.image_size:
            return None
        first = start >> self._bits
        part = self._layer.cached_slice(first >> self._slice_bits)
        if part is None or part.bad is not None:
            return None
        index = first & self._slice_mask
        last = index + ((end - 1) >> self._bits) - first
        value = part.entries[index]
        if value > ZERO:
            if last > index and not self._is_run(part.entries, index, last):
                return None
            return self._file, value + (start & self._cluster_mask)
        if value or last > index or self._below is None:
            return None
        return self._place_below(self._below, start)

    def _place_below(self, below: FlattenedBacking, start: int) -> tuple[HostFile, int] | None:
        """Do the same for what lies in one cluster that the top image does not have."""
        cluster = start >> self._bits
        codes = below.cached(cluster >> self._slice_bits)
        code = ZEROS if codes is None else codes[cluster & self._slice_mask]
        if code <= ZEROS:
            return None
        depth, value = place(code)
        return self._files[depth], value + (start & self._cluster_mask)

    def write(self, start: int, data: Buffer) -> bool:
        """Write a range; nothing is amiss if it was not done."""
        end = start + len(data)
        if not start < end <= self._layer.header.image_size:
            return False
        first = start >> self._bits
        part = self._layer.cached_slice(first >> self._slice_bits)
        index = first & self._slice_mask
        last = index + ((end - 1) >> self._bits) - first
        if part is None or part.bad is not None or last > self._slice_mask:
            return False
        value = part.entries[index]
        if value <= ZERO or self._run_end(part.entries, index, last) <= last:
            return self._write_runs(part, start, memoryview(data))
        if not self._write(value + (start & self._cluster_mask), data):
            return False
        self._writeback.note_write()
        return True

    def _write_runs(self, part: Slice, start: int, data: memoryview) -> bool:
        """Write a range within one slice run by run.

        If it is not all done, what is done already is written again, with the same bytes.
        """
        end = start + len(data)
        last = ((end - 1) >> self._bits) & self._slice_mask
        while data:
            first = start >> self._bits
            index = first & self._slice_mask
            until = self._run_end(part.entries, index, last)
            piece = data[: ((first + until - index) << self._bits) - start]
            value = part.entries[index]
            if value <= ZERO:
                done = self._new.write(part, first, until - index, start, piece)
            else:
                done = self._write(value + (start & self._cluster_mask), piece)
                self._writeback.note_write()
            if not done:
                return False
            start += len(piece)
            data = data[len(piece) :]
        return True

    def seek(self, start: int, *, data: bool) -> int | None:
        """Find the first byte at or past ``start`` that is data, or that is not.

        Returns:
            Its guest offset, the disk's size if there is none, None to go the long way.
        """
        size = self._layer.header.image_size
        if self._below is not None:
            return None
        cluster = start >> self._bits
        for _ in range(_MOST_SLICES):
            if (at := cluster << self._bits) >= size:
                return size
            part = self._layer.cached_slice(cluster >> self._slice_bits)
            if part is None or part.bad is not None:
                break
            if part is self._empty_slice and data:
                table = self._layer.next_cached_table(cluster // self._entries)
                if table is None:
                    break
                cluster = table * self._entries
                continue
            index = cluster & self._slice_mask
            entries = np.frombuffer(part.entries, np.uint64)[index:]
            found = entries > ZERO if data else entries <= ZERO
            first = int(found.argmax())
            if found[first]:
                return min(size, max(start, at + (first << self._bits)))
            cluster += self._slice_mask + 1 - index
        return None

    def _is_run(self, entries: array[int], first: int, last: int) -> bool:
        """Tell whether clusters lie one behind the other in the file."""
        return last <= self._slice_mask and self._run_end(entries, first, last) > last

    def _run_end(self, entries: array[int], first: int, last: int) -> int:
        """Find where a run of clusters that are stored in one way ends: past ``last`` at most."""
        value = entries[first]
        size = self._size if value > ZERO else 0
        for at in range(first + 1, last + 1):
            value += size
            if entries[at] != value:
                return at
        return last + 1

    def _gather(self, start: int, end: int) -> memoryview | None:
        """Read a range within one slice that is stored in several ways, or not at all."""
        if not start < end <= self._layer.header.image_size:
            return None
        first, last = start >> self._bits, (end - 1) >> self._bits
        part = self._layer.cached_slice(first >> self._slice_bits)
        apart = (first ^ last) >> self._slice_bits
        if part is None or part.bad is not None or apart:
            return None
        runs = self._runs(part.entries, start, end)
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
            elif not self._files[depth].try_read(offset, view):
                return None
            at += length
        return whole

    def _runs(self, entries: array[int], start: int, end: int) -> list[list[int]] | None:
        """List the runs of a range: depth in the chain, or -1 for zeros; file offset; length."""
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
                if value != ZERO and self._below is not None:
                    codes = codes or self._below.cached(first >> self._slice_bits)
                    code = MIXED if codes is None else codes[number & self._slice_mask]
                    if code == MIXED:
                        return None
                    if code != ZEROS:
                        depth, value = place(code)
            offset = value + (at & self._cluster_mask) if depth >= 0 else 0
            if runs and runs[-1][0] == depth and (depth < 0 or sum(runs[-1][1:]) == offset):
                runs[-1][2] += stop - at
            else:
                runs.append([depth, offset, stop - at])
            at = stop
        return runs
