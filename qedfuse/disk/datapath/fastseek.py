"""The search for data and holes without waiting, in slices of the tables that are in memory.

Like the fast path of reads and writes (`qedfuse.disk.datapath.fastpath`), the search gives up if a
slice is not in memory or has a bad entry.  The caller then starts the search again with
`qedfuse.disk.lookup.seek`, which waits, and which counts bad entries as data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from qedfuse.ondisk.constants import ZERO

if TYPE_CHECKING:
    from qedfuse.disk.lookup.layer import QedLayer

_MAX_SLICES_PER_SEEK: Final = 64
"""Maximum number of slices that one seek searches before it gives up."""


class FastSeek:
    """Searches for data and holes without waiting."""

    def __init__(self, layer: QedLayer, *, has_base: bool) -> None:
        """Search in ``layer``, the top of a chain; every search gives up if ``has_base`` is True.

        ``has_base`` is whether a base is open.
        """
        self._layer = layer
        self._has_base = has_base
        self._empty_slice = layer.tables.empty_slice
        self._bits = layer.geometry.cluster_bits
        self._entries = layer.geometry.entries
        self._slice_bits = layer.tables.slice_entries.bit_length() - 1
        self._slice_mask = layer.tables.slice_entries - 1

    def try_seek(self, start: int, *, data: bool) -> int | None:
        """Find the first data, or hole, at or past a guest offset; None if that would block.

        Args:
            start: Guest offset at which the search begins.
            data: Whether to search for data; if not, for a hole.

        Returns:
            The guest offset of the data or the hole; the size of the disk if there is none.
            None if a base is open, a slice or a part of the L1 table is not in memory, a slice
            has a bad entry, or the search needs more than `_MAX_SLICES_PER_SEEK` slices.
        """
        size = self._layer.header.image_size
        if self._has_base:
            return None
        cluster = start >> self._bits
        for _ in range(_MAX_SLICES_PER_SEEK):
            if (at := cluster << self._bits) >= size:
                return size
            slice_ = self._layer.cached_slice(cluster >> self._slice_bits)
            if slice_ is None or slice_.bad is not None:
                break
            if slice_ is self._empty_slice and data:
                table = self._layer.next_table_if_known(cluster // self._entries)
                if table is None:
                    break
                cluster = table * self._entries
                continue
            index = cluster & self._slice_mask
            entries = np.frombuffer(slice_.entries, np.uint64)[index:]
            found = entries > ZERO if data else entries <= ZERO
            first = int(found.argmax())
            if found[first]:
                return min(size, max(start, at + (first << self._bits)))
            cluster += self._slice_mask + 1 - index
        return None
