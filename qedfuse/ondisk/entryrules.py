"""The validity of table entries, and what to report about invalid ones.

The target of an entry is the table or the cluster to which the entry points.  This module applies
the limits of `qedfuse.ondisk.entrylimits` to all entries of a slice, and also finds targets that
overlap an L2 table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from qedfuse.ondisk.entrylimits import RESERVED_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from qedfuse.ondisk.entrylimits import EntryLimits

    Values: TypeAlias = NDArray[np.uint64]
    Mask: TypeAlias = NDArray[np.bool_]

NO_TABLES: Final[NDArray[np.uint64]] = np.empty(0, np.uint64)
"""The value of `EntryRules.tables` if overlaps with L2 tables are not checked."""


class Violation(enum.Enum):
    """Why an entry is invalid; if an entry breaks several rules, the one listed first counts."""

    RESERVED_BITS = enum.auto()
    """A bit is set that must be 0 in every offset, whatever the cluster size."""
    UNALIGNED = enum.auto()
    """The offset is not a multiple of the cluster size."""
    OUT_OF_FILE = enum.auto()
    """The target begins at or past the end of the file."""
    OVER_METADATA = enum.auto()
    """The target overlaps the header, the L1 table or an L2 table."""
    CUT_SHORT = enum.auto()
    """The target begins inside the file and ends past the end of the file."""

    @property
    def found(self) -> str:
        """What is wrong with the entry: a few words for the parentheses after its value."""
        return {
            Violation.RESERVED_BITS: "unaligned",
            Violation.UNALIGNED: "unaligned",
            Violation.OUT_OF_FILE: "outside the file",
            Violation.OVER_METADATA: "over the header or a table",
            Violation.CUT_SHORT: "cut short by the end of the file",
        }[self]


@dataclass(frozen=True, slots=True)
class EntryRules:
    """The rules for the entries of one level of tables.

    Attributes:
        limits: The limits that the header, the L1 table and the length of the file set.
        tables: File offsets of the L2 tables that targets must not overlap, ascending.
        allow_cut_short: Whether a target may begin inside the file and end past its end.
    """

    limits: EntryLimits
    tables: Values = field(default_factory=lambda: NO_TABLES)
    allow_cut_short: bool = False

    def valid_mask(self, values: Values) -> Mask:
        """Return for each entry whether it is a valid offset; False for markers, such as 0."""
        limits = self.limits
        bad: Mask = (values & np.uint64(limits.cluster_size - 1)) != 0
        if self.allow_cut_short:
            bad |= values >= limits.file_size
        else:
            bad |= values > max(0, limits.highest)
        bad |= self._over_metadata(values)
        return ~bad

    def invalid_mask(self, values: Values) -> Mask | None:
        """Return for each entry whether it is invalid; None if no entry is.

        Markers, such as 0 for an unallocated cluster, count as valid.
        """
        used = values > self.limits.largest_marker
        offsets = values[used]
        if not len(offsets) or self._are_surely_valid(offsets):
            return None
        bad: Mask = used & ~self.valid_mask(values)
        return bad if bad.any() else None

    def _are_surely_valid(self, offsets: Values) -> bool:
        """Return whether a quick test shows that all ``offsets`` are valid.

        There must be at least one offset, and no markers.
        """
        limits = self.limits
        lowest = int(offsets.min())
        highest = limits.file_size - 1 if self.allow_cut_short else limits.highest
        if lowest < limits.lowest_clear or int(offsets.max()) > highest:
            return False
        if int(np.bitwise_or.reduce(offsets)) & (limits.cluster_size - 1):
            return False
        if not len(self.tables):
            return True
        tables_end = int(self.tables[-1]) + limits.table_bytes
        return lowest >= tables_end or not self._any_over_table(offsets[offsets < tables_end])

    def violations(self, values: Values) -> Iterator[tuple[Violation, Mask]]:
        """Sort invalid entries by the first rule that each breaks; markers break no rule.

        ``allow_cut_short`` is ignored.

        Yields:
            Every violation in order, with a mask of the entries that break it and no earlier one.
        """
        limits = self.limits
        left = values > limits.largest_marker
        rules = (
            (Violation.RESERVED_BITS, (values & np.uint64(RESERVED_BITS)) != 0),
            (Violation.UNALIGNED, (values & np.uint64(limits.cluster_size - 1)) != 0),
            (Violation.OUT_OF_FILE, values >= limits.file_size),
            (Violation.OVER_METADATA, self._over_metadata(values)),
            (Violation.CUT_SHORT, values > max(0, limits.highest)),
        )
        for violation, broken in rules:
            yield violation, left & broken
            left &= ~broken

    def table_containing(self, values: Values) -> NDArray[np.intp]:
        """Return for each file offset the index of the table that contains it; -1 if none does."""
        if not len(self.tables):
            return np.full(len(values), -1)
        index = np.searchsorted(self.tables, values, "right") - 1
        inside = values - self.tables[index] < self.limits.table_bytes
        return np.where(inside, index, -1)

    def _over_metadata(self, values: Values) -> Mask:
        """Return for each offset whether its target overlaps the header or a table."""
        limits = self.limits
        over: Mask = values < limits.header_end
        over |= (values < limits.l1_end) & (values > limits.before_l1)
        if len(self.tables):
            before = np.searchsorted(self.tables, values, "right") - 1
            over |= (before >= 0) & (values - self.tables[before] < limits.table_bytes)
        return over

    def _any_over_table(self, offsets: Values) -> bool:
        """Return whether any of ``offsets`` lies in an L2 table; requires at least one table."""
        # A search for sorted offsets is several times faster.
        ordered = np.sort(offsets)
        before = self.tables.searchsorted(ordered, "right")
        inside = ordered - self.tables[before - 1] < np.uint64(self.limits.table_bytes)
        return bool(((before > 0) & inside).any())

    def expected(self, violation: Violation) -> str:
        """Return what was expected instead of an entry with this violation, for a message."""
        limits = self.limits
        is_table = limits.target == "table"
        return {
            Violation.RESERVED_BITS: (
                "0 or an offset whose low 12 bits are 0"
                if is_table
                else "0, 1 or an offset whose low 12 bits are 0"
            ),
            Violation.UNALIGNED: f"a multiple of {limits.cluster_size}",
            Violation.OUT_OF_FILE: (
                f"{'a table' if is_table else 'an offset'} inside the file of "
                f"{limits.file_size} bytes"
            ),
            Violation.OVER_METADATA: (
                "a table apart from the header and the L1 table"
                if is_table
                else "a cluster apart from the header and all tables"
            ),
            Violation.CUT_SHORT: (
                f"a whole {limits.target} inside the file of {limits.file_size} bytes"
            ),
        }[violation]

    def explain(self, value: int) -> str:
        """Return what was found and expected, for a message on an entry that is invalid."""
        for violation, broken in self.violations(np.array([value], np.uint64)):
            if broken[0] and not (violation is Violation.CUT_SHORT and self.allow_cut_short):
                expected = self.expected(violation)
                return f"found {value} ({violation.found}), expected {expected}"
        # The entry was invalid when the file was shorter.
        return f"found {value}, which was outside the file, expected an offset inside it"
