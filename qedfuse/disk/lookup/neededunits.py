"""Which units of a remote file the readers of its disk can need: first the tables, then the data.

Of a QED image these are the header, the tables and the allocated clusters; clusters that no entry
refers to are not read by anyone.  Of a raw file these are all bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qedfuse.disk.lookup.layer import QedLayer
from qedfuse.disk.lookup.slices import L2
from qedfuse.hostio.tablewalk import read_table
from qedfuse.remote.unitfile import UNIT_BYTES, units_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.ondisk.entryrules import Values


class NeededUnits:
    """The needed units of one file of a chain.

    The caller adds the tables, fetches them, adds the data, and fetches that.
    """

    def __init__(self, layer: Layer) -> None:
        """Need nothing yet of the file of ``layer``, which no program writes to."""
        self._layer = layer
        self._size = layer.file.size()
        self._needed = bytearray(units_of(self._size))

    @property
    def total_bytes(self) -> int:
        """How many bytes the needed units have."""
        past_end = len(self._needed) * UNIT_BYTES - self._size
        total = self._needed.count(1) * UNIT_BYTES
        return total - (past_end if self._needed[-1:] == b"\1" else 0)

    def runs(self, max_units: int) -> Iterator[tuple[int, int]]:
        """Yield the first and last unit of each run of adjacent needed units, in their order.

        A run lies within one of the blocks of ``max_units`` units into which the file is divided,
        so that a cache between this machine and the server that keeps such blocks fetches each
        once.
        """
        first = self._needed.find(1)
        while first >= 0:
            block_end = min(first - first % max_units + max_units, len(self._needed))
            end = self._needed.find(0, first, block_end)
            if end < 0:
                end = block_end
            yield first, end - 1
            first = self._needed.find(1, end)

    def add_tables(self) -> None:
        """Need the header and the tables of an image; nothing of a raw file."""
        layer = self._layer
        if not isinstance(layer, QedLayer):
            return
        length = layer.geometry.table_bytes
        self._add(0, layer.header.header_end)
        self._add(layer.header.l1_table_offset, length)
        for offset in layer.l2_tables.tolist():
            self._add(offset, length)

    async def add_data(self) -> None:
        """Need the allocated clusters of an image, and all of a raw file.

        The tables are read past the cache of tables, which belongs to the readers of the disk.
        Entries that are not valid are left out, because nothing can be read by them.

        Raises:
            HostError: A table cannot be read.
        """
        layer = self._layer
        if not isinstance(layer, QedLayer):
            self._add(0, self._size)
            return
        rules = layer.registry.entry_rules(L2)
        for offset in layer.l2_tables.tolist():
            async for _, values in read_table(layer.file, offset, layer.geometry.table_bytes):
                used = values > rules.limits.largest_marker
                bad = rules.invalid_mask(values)
                self._add_clusters(values[used if bad is None else used & ~bad])

    def _add_clusters(self, offsets: Values) -> None:
        """Need the clusters at some file offsets."""
        cluster = self._layer.geometry.cluster_size if isinstance(self._layer, QedLayer) else 1
        first = offsets // np.uint64(UNIT_BYTES)
        needed = np.frombuffer(self._needed, np.uint8)
        for unit in range(units_of(cluster)):
            # Only the last cluster of the file can reach past its end.
            here = first + np.uint64(unit)
            needed[here[here < len(needed)]] = 1

    def _add(self, offset: int, length: int) -> None:
        """Need the units of a range, as far as the file has them."""
        first = offset // UNIT_BYTES
        end = min(units_of(offset + length), len(self._needed))
        if first < end:
            self._needed[first:end] = b"\1" * (end - first)
