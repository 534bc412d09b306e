"""Counting what the tables of an image refer to: slice by slice, so in little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qedfuse.check.entryclassifier import EntryClassifier
from qedfuse.check.tables import read_l1_table
from qedfuse.hostio.tablewalk import read_table
from qedfuse.ondisk.constants import ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.check.findings import Code
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many clusters of the disk are stored in which way; what no table has is not counted.

    Attributes:
        l2_tables: L1 entries in use that point to a table.
        bad_tables: Those that do not.
        data: Clusters with an entry that points to data, right or wrong.
        zero: Clusters that read as zeros, whatever a base says.
    """

    l2_tables: int
    bad_tables: int
    data: int
    zero: int


async def count_allocation(
    file: HostFile, header: Header, progress: Callable[[int, int], None] | None = None
) -> Allocation:
    """Count what the tables refer to; ``progress`` is told of tables.

    Raises:
        NeedsCheckError: The image has absurdly many tables.
        HostError: The host cannot read the file.
    """
    bad = 0

    def count_bad(_code: Code, _first: int, _values: Values, mask: Mask) -> None:
        nonlocal bad
        bad += int(mask.sum())

    classifier = EntryClassifier(header, file.size())
    _indices, tables = await read_l1_table(file, classifier, count_bad)
    data = zero = 0
    for number, table in enumerate(tables.tolist()):
        async for _first, values in read_table(file, table, header.geometry.table_bytes):
            data += int((values > ZERO).sum())
            zero += int((values == ZERO).sum())
        if progress is not None:
            progress(number + 1, len(tables))
    return Allocation(len(tables), bad, data, zero)
