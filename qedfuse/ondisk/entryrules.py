"""The validity of table entries, for whole slices of a table at a time.

What makes an entry valid is written in `qedfuse.ondisk.entrylimits`; here the same limits
are applied to arrays, together with the L2 tables that a data cluster must not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from qedfuse.ondisk.entrylimits import RESERVED_BITS, EntryLimits, Violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Values: TypeAlias = NDArray[np.uint64]
    Mask: TypeAlias = NDArray[np.bool_]

NO_TABLES: Final[NDArray[np.uint64]] = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class EntryRules:
    """The rules for the entries of one level of tables.

    Attributes:
        limits: The limits that plain numbers can express.
        tables: File offsets of the L2 tables that no target may overlap, ascending.
        allow_cut_short: Whether a target may reach past the end of the file.
    """

    limits: EntryLimits
    tables: Values = field(default_factory=lambda: NO_TABLES)
    allow_cut_short: bool = False

    def valid_mask(self, values: Values) -> Mask:
        """Return for each entry whether it is a valid offset; markers are not."""
        limits = self.limits
        bad: Mask = (values & np.uint64(limits.cluster_size - 1)) != 0
        if self.allow_cut_short:
            bad |= values >= limits.file_size
        else:
            bad |= values > max(0, limits.highest)
        bad |= self._over_metadata(values)
        return ~bad

    def all_valid(self, ordered: Values) -> bool:
        """Return whether sorted offsets are all valid; False may also mean unknown.

        Tables are read far more often than an entry is invalid, and sorted offsets are
        several times as fast to check: mostly by the first and the last one.
        """
        limits = self.limits
        first, last = int(ordered[0]), int(ordered[-1])
        highest = limits.file_size - 1 if self.allow_cut_short else limits.highest
        if first < limits.lowest_clear or last > highest:
            return False
        if int(np.bitwise_or.reduce(ordered)) & (limits.cluster_size - 1):
            return False
        return not self._any_over_table(ordered)

    def violations(self, values: Values) -> Iterator[tuple[Violation, Mask]]:
        """Sort invalid entries by the first rule that each breaks; markers break none.

        Yields:
            A violation, and which of the entries it applies to; an entry is in one mask
            at most.
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

    def table_under(self, values: Values) -> NDArray[np.intp]:
        """Return for each file offset the index of the L2 table that it lies in, or -1."""
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

    def _any_over_table(self, ordered: Values) -> bool:
        """Return whether any of some sorted offsets lies in an L2 table."""
        if not len(self.tables):
            return False
        span = np.uint64(self.limits.table_bytes)
        among = ordered[: int(ordered.searchsorted(self.tables[-1] + span))]
        before = self.tables.searchsorted(among, "right")
        return bool(((before > 0) & (among - self.tables[before - 1] < span)).any())

    def explain(self, value: int) -> str:
        """Say what is wrong with an entry that `valid_mask` found invalid."""
        for violation, broken in self.violations(np.array([value], np.uint64)):
            if broken[0] and not (violation is Violation.CUT_SHORT and self.allow_cut_short):
                expected = self.limits.expected(violation)
                return f"found {value} ({violation.found}), expected {expected}"
        # A writer has changed the length of the file since the entry was read.
        return f"found {value}, which was outside the file, expected an offset inside it"
