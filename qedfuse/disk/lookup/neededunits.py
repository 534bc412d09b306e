"""The units of a remote file that readers of its disk can need: those of tables and those of data.

A unit is a part of the file (`qedfuse.remote.unitfile`).  Readers of a QED image can need the
header, the tables and the allocated clusters.  Readers of a raw file can need all bytes.
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
    """Which units of one file of a chain are needed.

    The caller adds the units of the tables first, and fetches them.  `add_data` then reads the
    tables.
    """

    def __init__(self, layer: Layer) -> None:
        """Start with no needed unit; the file of ``layer`` must not change from now on."""
        self._layer = layer
        self._size = layer.file.size()
        self._needed = bytearray(units_of(self._size))

    @property
    def mask(self) -> bytes:
        """One byte for each unit of the file: 1 if the unit is needed, 0 if not."""
        return bytes(self._needed)

    @property
    def total_bytes(self) -> int:
        """How many bytes the needed units have."""
        past_end = len(self._needed) * UNIT_BYTES - self._size
        total = self._needed.count(1) * UNIT_BYTES
        return total - (past_end if self._needed[-1:] == b"\1" else 0)

    def runs(self, max_units: int) -> Iterator[tuple[int, int]]:
        """Yield the first and last unit of each run of adjacent needed units, ascending.

        No run crosses the end of a block of ``max_units`` units.  So for each run, a caching proxy
        that stores the file in such blocks needs only one block.
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
        """Add the units of the header and the tables of an image; do nothing for a raw file."""
        layer = self._layer
        if not isinstance(layer, QedLayer):
            return
        length = layer.geometry.table_bytes
        self._add(0, layer.header.header_end)
        self._add(layer.header.l1_table_offset, length)
        for offset in layer.l2_tables.tolist():
            self._add(offset, length)

    async def add_data(self) -> None:
        """Add the units of the allocated clusters of an image, or all units of a raw file.

        The tables are not loaded into the table cache, so its content stays useful for readers.
        Invalid entries are left out.

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
        """Add the units of the clusters at the file offsets ``offsets``."""
        cluster = self._layer.geometry.cluster_size if isinstance(self._layer, QedLayer) else 1
        first = offsets // np.uint64(UNIT_BYTES)
        needed = np.frombuffer(self._needed, np.uint8)
        for unit in range(units_of(cluster)):
            # Leave out units past the end of the file, which may end within its last cluster.
            here = first + np.uint64(unit)
            needed[here[here < len(needed)]] = 1

    def _add(self, offset: int, length: int) -> None:
        """Add the units of a range; ignore the part of the range past the end of the file."""
        first = offset // UNIT_BYTES
        end = min(units_of(offset + length), len(self._needed))
        if first < end:
            self._needed[first:end] = b"\1" * (end - first)
