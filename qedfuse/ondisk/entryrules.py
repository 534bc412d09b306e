"""Where in a file table entries may point to: what an image says of itself is not believed.

An entry that points elsewhere would let a guest write to tables or to the header, or lies
outside of the file, where it is going to be somebody else's cluster once the file grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qedfuse.ondisk.header import Header


@dataclass(frozen=True, slots=True)
class EntryRules:
    """What there is room for between the header, the tables and the end of a file.

    Attributes:
        header: Where the header ends and the L1 table lies.
        end: Where the file ends.
        tables: The L2 tables to stay clear of, by their file offsets, ascending.
        length: Bytes of what the entries point to.
        cut: Whether that may reach past the end of the file.
    """

    header: Header
    end: int
    tables: NDArray[np.uint64]
    length: int
    cut: bool

    def valid_mask(self, values: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell for each entry whether it is good."""
        header, geometry = self.header, self.header.geometry
        bad: NDArray[np.bool_] = (values & np.uint64(geometry.cluster_mask)) != 0
        bad |= values < header.header_end
        if self.cut:
            bad |= values >= self.end
        else:
            bad |= values > max(0, self.end - self.length)
        l1_start = header.l1_table_offset
        bad |= (values < header.l1_end) & (values > max(0, l1_start - self.length))
        if len(self.tables):
            before = np.searchsorted(self.tables, values, "right") - 1
            bad |= (before >= 0) & (values - self.tables[before] < geometry.table_bytes)
        return ~bad

    def all_valid(self, ordered: NDArray[np.uint64]) -> bool:
        """Tell whether entries, sorted, are all good; False may also mean unknown.

        A table is read far more often than an entry is bad, and of sorted entries that is
        known several times as fast: mostly by the first and the last of them.
        """
        header, geometry = self.header, self.header.geometry
        length = 1 if self.cut else self.length
        first, last = int(ordered[0]), int(ordered[-1])
        if first < max(header.header_end, header.l1_end) or last > self.end - length:
            return False
        if int(np.bitwise_or.reduce(ordered)) & geometry.cluster_mask:
            return False
        if not len(self.tables):
            return True
        span = np.uint64(geometry.table_bytes)
        among = ordered[: int(ordered.searchsorted(self.tables[-1] + span))]
        before = self.tables.searchsorted(among, "right")
        return not bool(((before > 0) & (among - self.tables[before - 1] < span)).any())

    def explain(self, value: int) -> str:
        """Say what is wrong with an entry that is not good."""
        geometry = self.header.geometry
        if geometry.in_cluster(value):
            found = "unaligned"
            expected = f"a multiple of {geometry.cluster_size}"
        elif value >= self.end:
            found = "outside the file"
            expected = f"an offset inside its {self.end} bytes"
        else:
            found = "over the header or a table, or cut short"
            expected = "a place of its own inside the file"
        return f"found {value} ({found}), expected {expected}"
