"""The classification of table entries: valid, or the code of a finding.

Entries are classified a slice at a time: a full image of 1 TiB has 16.7 million of them.
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

_EXPECTED_BESIDE_OTHERS: Final = {
    Code.TABLE_OVERLAP: "a table that shares no cluster with another",
    Code.DUPLICATE_CLUSTER: "a cluster that no other entry refers to",
    Code.FREE_LIST_CONTRADICTED: "a cluster that the free list does not have",
}
"""What was expected of entries that are invalid only because of other entries or the list."""


class EntryClassifier:
    """Sorts the entries of tables into valid ones and kinds of invalid ones.

    The rules are those of `qedfuse.ondisk.entryrules`; here each broken rule gets its code.

    Attributes:
        header: The header of the image.
        file_size: Length of the file in bytes.
        tables: File offsets of the L2 tables that data must not overlap, ascending.
    """

    def __init__(self, header: Header, file_size: int, tables: Values = NO_TABLES) -> None:
        """Classify the entries of an image whose file has ``file_size`` bytes."""
        self.header = header
        self.file_size = file_size
        self.tables = tables
        self._l1_rules = EntryRules(EntryLimits.for_l1(header, file_size))
        self._l2_rules = EntryRules(EntryLimits.for_l2(header, file_size), tables)

    def with_tables(self, tables: Values) -> EntryClassifier:
        """Return a classifier for the same file that knows these L2 tables."""
        return EntryClassifier(self.header, self.file_size, tables)

    def l1_errors(self, values: Values) -> Iterator[tuple[Code, Mask]]:
        """Yield each kind of invalid L1 entries and which they are; no entry has two kinds."""
        for violation, mask in self._l1_rules.violations(values):
            yield _L1_CODES[violation], mask

    def l2_errors(self, values: Values) -> Iterator[tuple[Code, Mask]]:
        """Yield each kind of invalid L2 entries and which they are; no entry has two kinds."""
        for violation, mask in self._l2_rules.violations(values):
            yield _L2_CODES[violation], mask

    def table_under(self, values: Values) -> NDArray[np.intp]:
        """Return for each file offset the index in `tables` of the table it lies in, or -1."""
        return self._l2_rules.table_under(values)

    def expected(self, code: Code) -> str:
        """Describe what was expected instead of an entry with an error."""
        for rules, codes in ((self._l1_rules, _L1_CODES), (self._l2_rules, _L2_CODES)):
            for violation, violation_code in codes.items():
                if code is violation_code:
                    return rules.expected(violation)
        return _EXPECTED_BESIDE_OTHERS[code]
