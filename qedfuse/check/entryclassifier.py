"""Which code of a finding the check gives to an invalid table entry.

Everything is done on whole slices with numpy: a full 1 TiB image has 16.7 million entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.check.findings import Code
from qedfuse.ondisk.entrylimits import EntryLimits, Violation
from qedfuse.ondisk.entryrules import NO_TABLES, EntryRules

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from qedfuse.ondisk.entryrules import Mask, Values
    from qedfuse.ondisk.header import Header


_L1_CODES: Final = {violation: Code[f"L1_{violation.name}"] for violation in Violation}
_L2_CODES: Final = {violation: Code[f"L2_{violation.name}"] for violation in Violation}


class EntryClassifier:
    """Sorts the entries of tables into valid ones and kinds of invalid ones.

    The rules are those of `qedfuse.ondisk.entryrules`; here each broken rule gets its code.

    Attributes:
        header: The header of the image.
        file_size: Length of the file in bytes.
        tables: File offsets of the L2 tables known so far, ascending.
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
        return self._EXPECTED.get(code) or next(
            rules.limits.expected(violation)
            for rules, codes in ((self._l1_rules, _L1_CODES), (self._l2_rules, _L2_CODES))
            for violation, named in codes.items()
            if named is code
        )

    _EXPECTED: Final = {
        Code.TABLE_OVERLAP: "a table that shares no cluster with another",
        Code.DUPLICATE_CLUSTER: "a cluster that no other entry refers to",
        Code.FREE_LIST_CONTRADICTED: "a cluster that the free list does not have",
    }
