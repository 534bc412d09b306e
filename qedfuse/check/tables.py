"""Which L2 tables an image has, and which of them share clusters.

An L1 table can be 1 GiB and name 134 million tables, all of them holes of a sparse file:
what is done for each is done on arrays, and other tasks run in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.check.findings import Code
from qedfuse.errors import NeedsCheckError
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import UNALLOCATED

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.check.entryclassifier import EntryClassifier
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values

    Indices = NDArray[np.int64]

MAX_TABLES: Final = 1 << 22
"""Most L2 tables that are looked at; 64 TiB in clusters of 64 KiB have 32768."""

_TABLES_PER_STEP: Final = 1 << 13
"""Tables that are handled before other tasks get a turn."""


async def read_l1_table(
    file: HostFile,
    classifier: EntryClassifier,
    bad: Callable[[Code, int, Values, Mask], None],
    *,
    keep_short: bool = False,
) -> tuple[Indices, Values]:
    """Read the L1 table and give the index and the file offset of each good entry.

    ``bad`` is called for each kind of bad entries in each slice, with the kind, the
    index of the slice's first entry, its entries, and which of them are meant.  With
    ``keep_short`` a table of which the file holds only a part counts as good.

    Raises:
        NeedsCheckError: There are more than `MAX_TABLES`.
    """
    indices: list[Indices] = [np.empty(0, np.int64)]
    tables: list[Values] = [np.empty(0, np.uint64)]
    count = 0
    header = classifier.header
    length = header.geometry.table_bytes
    async for first, values in read_table(file, header.l1_table_offset, length):
        good = values != UNALLOCATED
        for code, mask in classifier.l1_errors(values):
            if keep_short and code is Code.L1_CUT_SHORT:
                continue
            good &= ~mask
            bad(code, first, values, mask)
        where = np.flatnonzero(good)
        refuse_too_many_tables(file, count := count + len(where))
        indices.append(where + first)
        tables.append(values[where])
    return np.concatenate(indices), np.concatenate(tables)


class EntryChanges:
    """New values for some entries of a table, to be put into its slices one by one."""

    def __init__(self, entries: dict[int, int]) -> None:
        """Take the new values by index."""
        self._indices = np.array(sorted(entries), np.int64)
        self._values = np.array([entries[index] for index in self._indices.tolist()], np.uint64)

    def applied(self, first: int, values: Values) -> Values:
        """Give a slice that begins at index ``first`` with the new values."""
        begin, end = np.searchsorted(self._indices, [first, first + len(values)])
        fixed = values.copy()
        fixed[self._indices[begin:end] - first] = self._values[begin:end]
        return fixed


def refuse_too_many_tables(file: HostFile, count: int) -> None:
    """Refuse an image with more L1 entries than there is memory for."""
    if count > MAX_TABLES:
        msg = f"{file.name}: too large to check: found more than {MAX_TABLES} L1 entries in use"
        raise NeedsCheckError(msg)


async def overlapping(tables: Values, table_bytes: int) -> Mask:
    """Tell which of some tables, sorted by file offset, overlap one before them.

    Tables that are told so no longer count for those behind them.
    """
    answer = np.zeros(len(tables), np.bool_)
    if len(tables) < 2 or (np.diff(tables) >= table_bytes).all():  # noqa: PLR2004
        return answer
    end = -1
    for start in range(0, len(tables), _TABLES_PER_STEP):
        for place, table in enumerate(tables[start : start + _TABLES_PER_STEP].tolist(), start):
            if table < end:
                answer[place] = True
            else:
                end = table + table_bytes
        await trio.lowlevel.checkpoint()
    return answer
