"""The short way of a write into new clusters, where nothing has to be waited for.

Usually the table is in memory, its place in the file is reserved, NEED_CHECK is set, and
the file reaches over the clusters that come next.  Then a cluster is chosen, filled and
pointed to without anybody else running in between, and only what must not be done in the
midst of somebody else's work is asked for: whether another request holds these clusters,
and whether clusters should be freed before the file grows.

The order is that of the long way (`WritePath`): the data is written first, and only then
the entry that makes it visible changes, in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.disk.lookup.flattenedbacking import MIXED, ZEROS, place
from qedfuse.ondisk.constants import UNALLOCATED

if TYPE_CHECKING:
    from qedfuse.disk.datapath.writepath import WritePath
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.layer import QedLayer
    from qedfuse.disk.lookup.tablecache import Slice
    from qedfuse.disk.space.allocator import Run
    from qedfuse.disk.space.spacemanager import SpaceManager
    from qedfuse.disk.state.needcheck import NeedCheck
    from qedfuse.hostio.hostfile import Buffer


class FastAllocation:
    """Gives clusters a place, and writes to them, at once."""

    def __init__(
        self,
        chain: Chain,
        layer: QedLayer,
        space: SpaceManager,
        needcheck: NeedCheck,
        write_path: WritePath,
        buffer: memoryview,
    ) -> None:
        """Allocate for ``layer``, the top of ``chain``; ``buffer`` is for one request's bytes."""
        self._layer = layer
        self._below = chain.below
        self._files = [one.file for one in chain.layers]
        self._space = space
        self._needcheck = needcheck
        self._write_path = write_path
        self._buffer = buffer
        self._bits = layer.geometry.cluster_bits
        self._size = layer.geometry.cluster_size

    def write(self, part: Slice, first: int, count: int, start: int, data: Buffer) -> bool:
        """Write to ``count`` clusters from cluster ``first`` on; if it was not done, no harm is.

        ``part`` is the slice with their entries, which are all 0 or all 1; ``start`` is the
        guest offset of the data.
        """
        tables = self._layer.tables
        index = first & (tables.slice_entries - 1)
        base = first << self._bits
        if not (
            part is not tables.empty_slice
            and tables.is_reserved(part)
            and self._needcheck.is_set
            and self._write_path.is_free(base, base + (count << self._bits))
        ):
            return False
        length = count << self._bits
        # What may fail comes before a run is taken: one that is given back was in use.
        shown = self._bring(part.entries[index], base, length) if len(data) < length else 0
        if shown is None or not self._layer.file.can_write_inline(length if shown else len(data)):
            return False
        run = self._space.try_allocate(count)
        if run is None:
            return False
        if not self._fill(run, start - base, data, shown):
            self._space.release(run)
            return False
        offset = run.offset
        for at in range(index, index + count):
            tables.set(part, at, offset)
            offset += self._size
        self._needcheck.note_change()
        return True

    def _bring(self, kind: int, base: int, length: int) -> int | None:
        """Read what shows through at guest offset ``base`` into the buffer.

        Returns:
            How many bytes do; the rest is zeros.  None if that needs waiting.
        """
        if kind != UNALLOCATED or self._below is None:
            return 0
        # What is around lies in one cluster, or the long way puts it together.
        number = base >> self._bits
        entries = self._layer.tables.slice_entries
        codes = self._below.cached(number // entries) if length == self._size else None
        code = MIXED if codes is None else codes[number & (entries - 1)]
        if code <= ZEROS:
            return None if code == MIXED else 0
        # Past the disk's end the base must not be copied: if the disk grew one day, it
        # would show there instead of zeros.
        shown = min(length, self._layer.size - base)
        depth, offset = place(code)
        if length > len(self._buffer):
            return None
        return shown if self._files[depth].try_read(offset, self._buffer[:shown]) else None

    def _fill(self, run: Run, inside: int, data: Buffer, shown: int) -> bool:
        """Write a run: the data ``inside`` bytes from its beginning, and what is around it.

        That is the first ``shown`` bytes in the buffer, and zeros.
        """
        write = self._layer.file.try_write
        if len(data) == run.length:
            return write(run.offset, data)
        if run.never_written and not shown:
            return write(run.offset + inside, data)
        if run.length > len(self._buffer):
            return False
        whole = self._buffer[: run.length]
        whole[shown:] = bytes(run.length - shown)
        whole[inside : inside + len(data)] = data
        return write(run.offset, whole)
