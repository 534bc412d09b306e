"""The classification of table entries: an entry is valid, or has the code of an error.

All entries of a slice (at most 64 KiB of a table) are classified together, as an array: a full
image of 1 TiB has 16.8 million entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.check.findings import Code
from qedfuse.ondisk.entrylimits import EntryLimits
from qedfuse.ondisk.entryrules import NO_TABLES, EntryRules, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header


_L1_CODES: Final = {violation: Code[f"L1_{violation.name}"] for violation in Violation}
_L2_CODES: Final = {violation: Code[f"L2_{violation.name}"] for violation in Violation}

_EXPECTED_IN_CONFLICTS: Final = {
    Code.TABLE_OVERLAP: "a table that shares no cluster with another",
    Code.DUPLICATE_CLUSTER: "a cluster that no other entry refers to",
    Code.FREE_LIST_CONTRADICTED: "a cluster that is not in the free list",
}
"""What was expected, for each conflict of a valid entry with another one or the free list."""


class EntryClassifier:
    """Finds the invalid entries in arrays of entries, by the rules of `qedfuse.ondisk.entryrules`.

    Attributes:
        header: The header of the image.
        file_size: Length in bytes that the file has, or that a repair will give it.  Entries must
            not refer to bytes past it.
        tables: File offsets of the L2 tables that data must not overlap, ascending; `NO_TABLES` for
            no check.
    """

    def __init__(self, header: Header, file_size: int, tables: Values = NO_TABLES) -> None:
        """Prepare to classify the entries of an image; the arguments are the attributes."""
        self.header = header
        self.file_size = file_size
        self.tables = tables
        self._l1_rules = EntryRules(EntryLimits.for_l1(header, file_size))
        self._l2_rules = EntryRules(EntryLimits.for_l2(header, file_size), tables)

    def with_tables(self, tables: Values) -> EntryClassifier:
        """Return a classifier for the same file, which checks overlaps with ``tables`` instead."""
        return EntryClassifier(self.header, self.file_size, tables)

    def l1_errors(self, values: Values) -> Iterator[tuple[Code, Mask]]:
        """Yield each possible error of L1 entries, and a mask of the entries that have it.

        A mask can be all False.  No entry is in two masks.
        """
        for violation, mask in self._l1_rules.violations(values):
            yield _L1_CODES[violation], mask

    def l2_errors(self, values: Values) -> Iterator[tuple[Code, Mask]]:
        """Yield each possible error of L2 entries, and a mask of the entries that have it.

        A mask can be all False.  No entry is in two masks.
        """
        for violation, mask in self._l2_rules.violations(values):
            yield _L2_CODES[violation], mask

    def table_containing(self, values: Values) -> NDArray[np.intp]:
        """Return for each file offset the index in `tables` of the table around it, or -1."""
        return self._l2_rules.table_containing(values)

    def expected(self, code: Code) -> str:
        """Describe what was expected instead of an entry with the error ``code``, for messages.

        Raises:
            KeyError: The error ``code`` is not about an entry.
        """
        for rules, codes in ((self._l1_rules, _L1_CODES), (self._l2_rules, _L2_CODES)):
            for violation, violation_code in codes.items():
                if code is violation_code:
                    return rules.expected(violation)
        return _EXPECTED_IN_CONFLICTS[code]
