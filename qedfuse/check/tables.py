"""Which L2 tables an image has, which of them overlap, and new values for entries of a table.

Even a small sparse file can have an L1 table of 1 GiB with 134 million entries.  So the tables are
handled in arrays, and other tasks run between the steps.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
import trio

from qedfuse.check.findings import Code
from qedfuse.errors import NeedsCheckError
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import UNALLOCATED
from qedfuse.ondisk.entrylimits import overlaps

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from qedfuse.check.entryclassifier import EntryClassifier
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values

    Indices = NDArray[np.int64]

MAX_TABLES: Final = 1 << 22
"""Maximum number of L2 tables in an image that can be checked, and maximum number of invalid L1
entries in an image that can be repaired."""

_TABLES_PER_STEP: Final = 1 << 13
"""Maximum number of tables that are compared before other tasks run."""


async def read_l1_table(
    file: HostFile,
    classifier: EntryClassifier,
    report: Callable[[Code, int, Values, Mask], None],
    *,
    keep_short: bool = False,
) -> tuple[Indices, Values]:
    """Read the L1 table; return the indices of its valid entries and the offsets of their tables.

    Unallocated entries are left out.

    Args:
        file: The image.
        classifier: Finds the invalid entries.
        report: Called for each slice of the L1 table and each possible error.  The arguments are
            the error, the index of the first entry, the entries, and a mask of the bad ones.
        keep_short: Whether an entry is valid if it points to a table that the end of the file
            cuts short.

    Raises:
        HostError: The host cannot read the file.
        NeedsCheckError: There are more than `MAX_TABLES` valid entries.
    """
    indices: list[Indices] = [np.empty(0, np.int64)]
    tables: list[Values] = [np.empty(0, np.uint64)]
    count = 0
    header = classifier.header
    length = header.geometry.table_bytes
    async for first, values in read_table(file, header.l1_table_offset, length):
        valid = values != UNALLOCATED
        for code, mask in classifier.l1_errors(values):
            if keep_short and code is Code.L1_CUT_SHORT:
                continue
            valid &= ~mask
            report(code, first, values, mask)
        where = np.flatnonzero(valid)
        refuse_too_many_tables(file, count := count + len(where))
        indices.append(where + first)
        tables.append(values[where])
    return np.concatenate(indices), np.concatenate(tables)


class EntryChanges:
    """New values for some entries of a table."""

    def __init__(self, entries: dict[int, int]) -> None:
        """Take the new values; ``entries`` maps the index of an entry in the table to its value."""
        self._indices = np.array(sorted(entries), np.int64)
        self._values = np.array([entries[index] for index in self._indices.tolist()], np.uint64)

    def applied(self, first: int, values: Values) -> Values:
        """Return a changed copy of a slice; ``first`` is the index of the slice's first entry."""
        begin, end = np.searchsorted(self._indices, [first, first + len(values)])
        fixed = values.copy()
        fixed[self._indices[begin:end] - first] = self._values[begin:end]
        return fixed


def refuse_too_many_tables(file: HostFile, count: int) -> None:
    """Raise NeedsCheckError if ``count`` L1 entries are too many to be kept in memory."""
    if count > MAX_TABLES:
        msg = f"{file.name}: too large to check: found more than {MAX_TABLES} L1 entries in use"
        raise NeedsCheckError(msg)


async def overlapping(tables: Values, table_bytes: int) -> Mask:
    """Return a mask of the tables that overlap an earlier table.

    An earlier table that is itself in the mask does not count.

    Args:
        tables: The file offsets of tables, ascending; equal offsets are permitted.
        table_bytes: The length of each table in bytes.
    """
    mask = np.zeros(len(tables), np.bool_)
    if len(tables) < 2 or (np.diff(tables) >= table_bytes).all():  # noqa: PLR2004
        return mask
    steps = range(0, len(tables), _TABLES_PER_STEP)
    ordered = (table for at in steps for table in tables[at : at + _TABLES_PER_STEP].tolist())
    found = overlaps(ordered, table_bytes)
    for at in steps:
        step = np.fromiter(islice(found, _TABLES_PER_STEP), np.bool_)
        mask[at : at + len(step)] = step
        await trio.lowlevel.checkpoint()
    return mask
