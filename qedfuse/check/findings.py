"""The results of checks and repairs as data, from which text, JSON and exit codes are made."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

MAX_FINDINGS_PER_CODE: Final = 50
"""Findings of each code that are kept; the others are only counted.  An image can have billions."""


class Severity(enum.IntEnum):
    """How bad a finding is."""

    NOTE = 0
    """Unusual, but harmless."""
    LEAK = 1
    """Clusters of the file that no table refers to."""
    ERROR = 2
    """Tables that contradict each other or the file: data is lost, or will be overwritten."""


class Code(enum.Enum):
    """The kinds of findings; the value is what scripts see."""

    L1_RESERVED_BITS = "l1-reserved-bits"
    L1_UNALIGNED = "l1-unaligned"
    L1_OUT_OF_FILE = "l1-out-of-file"
    L1_CUT_SHORT = "l1-cut-short"
    L1_OVER_METADATA = "l1-over-metadata"
    TABLE_OVERLAP = "table-overlap"
    L2_RESERVED_BITS = "l2-reserved-bits"
    L2_UNALIGNED = "l2-unaligned"
    L2_OUT_OF_FILE = "l2-out-of-file"
    L2_CUT_SHORT = "l2-cut-short"
    L2_OVER_METADATA = "l2-over-metadata"
    DUPLICATE_CLUSTER = "duplicate-cluster"
    FREE_LIST_BAD = "free-list-bad"
    FREE_LIST_CONTRADICTED = "free-list-contradicted"
    LEAKED_CLUSTERS = "leaked-clusters"
    HEADER_SIZE_ZERO = "header-size-zero"
    NAME_IN_FIXED_HEADER = "backing-name-in-fixed-header"
    BACKING_NAME_EMPTY = "backing-name-empty"
    NO_PROBE_WITHOUT_BACKING = "no-probe-without-backing"
    NEED_CHECK_SET = "need-check-set"
    UNKNOWN_COMPAT = "unknown-compat-bits"
    UNKNOWN_AUTOCLEAR = "unknown-autoclear-bits"
    ODD_TAIL = "odd-tail"
    PAST_IMAGE_SIZE = "data-past-image-size"
    MOSTLY_LEAKED = "mostly-leaked"

    @property
    def severity(self) -> Severity:
        """How bad findings of this kind are."""
        if self is Code.LEAKED_CLUSTERS:
            return Severity.LEAK
        return Severity.NOTE if self in _NOTE_CODES else Severity.ERROR


_NOTE_CODES: Final = frozenset(
    {
        Code.HEADER_SIZE_ZERO,
        Code.NAME_IN_FIXED_HEADER,
        Code.BACKING_NAME_EMPTY,
        Code.NO_PROBE_WITHOUT_BACKING,
        Code.NEED_CHECK_SET,
        Code.UNKNOWN_COMPAT,
        Code.UNKNOWN_AUTOCLEAR,
        Code.ODD_TAIL,
        Code.PAST_IMAGE_SIZE,
        Code.MOSTLY_LEAKED,
    }
)


FREE_LIST_CODES: Final = frozenset({Code.FREE_LIST_BAD, Code.FREE_LIST_CONTRADICTED})
"""Errors of the persistent free list only; dropping the list removes them."""


_INVALID_L2_CODES: Final = frozenset(
    {Code.L2_RESERVED_BITS, Code.L2_UNALIGNED, Code.L2_OUT_OF_FILE, Code.L2_OVER_METADATA}
)
"""Errors of L2 entries that cannot refer to a data cluster."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One error, leak or note; offsets and lengths in bytes.

    Attributes:
        code: Its kind.
        message: One line: where it is, what was found, and what was expected.
        file_offset: Offset in the file, or the invalid entry itself; None if there is none.
        guest_start: Where the range of the disk begins that it affects; None if it affects none.
        guest_length: Length of that range.
    """

    code: Code
    message: str
    file_offset: int | None = None
    guest_start: int | None = None
    guest_length: int | None = None

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return self.code.severity


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of a check.

    Attributes:
        findings: Up to `MAX_FINDINGS_PER_CODE` findings of each code.
        counts: Number of findings of each code; for leaks, the number of clusters.
        allocated_clusters: Data clusters that tables refer to.
        file_clusters: Clusters in the file.
        listed_clusters: Clusters in the persistent free list, which are not leaked; None if
            the image has no valid list.
        fragmented_clusters: Data clusters that do not follow the one before them in
            their table.
    """

    findings: tuple[Finding, ...]
    counts: dict[Code, int]
    allocated_clusters: int
    file_clusters: int
    listed_clusters: int | None = None
    fragmented_clusters: int = 0

    @property
    def errors(self) -> int:
        """The number of findings that are errors."""
        return sum(
            number for code, number in self.counts.items() if code.severity is Severity.ERROR
        )

    @property
    def referenced_clusters(self) -> int:
        """The number of L2 entries that hold an offset, valid or not."""
        return self.allocated_clusters + sum(self.counts.get(code, 0) for code in _INVALID_L2_CODES)

    @property
    def table_errors(self) -> int:
        """The number of errors that are not only about the persistent free list."""
        return self.errors - sum(self.counts.get(code, 0) for code in FREE_LIST_CODES)

    @property
    def leaks(self) -> int:
        """The number of clusters that nothing refers to."""
        return self.counts.get(Code.LEAKED_CLUSTERS, 0)

    @property
    def is_implausible(self) -> bool:
        """Whether what was read as tables is probably something else.

        One flipped bit in the header makes other bytes of the file look like tables.  Then
        nearly all clusters seem to be leaked, and data of the guest is read as entries.
        """
        suspicious = not self.allocated_clusters or Code.MOSTLY_LEAKED in self.counts
        return suspicious and bool(self.errors or self.leaks)

    @property
    def worst_severity(self) -> Severity | None:
        """The highest severity of a finding; None if there is no finding."""
        return max((code.severity for code in self.counts), default=None)

    def as_json(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return {
            "errors": self.errors,
            "leaks": self.leaks,
            "allocated_clusters": self.allocated_clusters,
            "file_clusters": self.file_clusters,
            "listed_clusters": self.listed_clusters,
            "counts": {code.value: number for code, number in self.counts.items()},
            "findings": [
                asdict(item) | {"code": item.code.value, "severity": item.severity.name.lower()}
                for item in self.findings
            ],
        }


@dataclass(frozen=True, slots=True)
class LostRange:
    """A range of the disk, in bytes, whose data is lost or possibly wrong.

    It reads as zeros after the repair.  Only a range that a table overlapped
    (`Code.L2_OVER_METADATA`) may read as before.
    """

    start: int
    length: int
    code: Code


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair would do.

    Attributes:
        lost: Ranges whose data would be lost.
        copied: Number of clusters that would be copied.
        cleared: Number of entries that would be cleared.
        written: Bytes that would be written, approximately.
        end: Length of the file after the repair in bytes; 0 if nothing is planned.
    """

    lost: tuple[LostRange, ...] = ()
    copied: int = 0
    cleared: int = 0
    written: int = 0
    end: int = 0


@dataclass(slots=True)
class FindingCollector:
    """Collects findings: all are counted, the first of each code are kept."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Code] = field(default_factory=Counter)

    def remaining(self, code: Code) -> int:
        """Return how many more findings of a code will be kept."""
        return max(0, MAX_FINDINGS_PER_CODE - self.counts[code])

    def add(self, finding: Finding, count: int = 1) -> None:
        """Add a finding that stands for ``count`` findings; keep it unless the limit is reached."""
        if self.remaining(finding.code):
            self.findings.append(finding)
        if count:
            self.counts[finding.code] += count

    def count_only(self, code: Code, count: int) -> None:
        """Count findings without keeping them."""
        if count:
            self.counts[code] += count
