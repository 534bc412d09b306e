"""What a check found and a repair does, as data: text, JSON and exit codes are views of it."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

MAX_FINDINGS_PER_CODE: Final = 50
"""Findings kept of each code; all are counted, but a hostile image could make billions."""


class Severity(enum.IntEnum):
    """How bad a finding is."""

    NOTE = 0
    """Odd, but harmless."""
    LEAK = 1
    """Space in the file that nothing refers to."""
    ERROR = 2
    """Tables that contradict each other or the file: data is lost or in danger."""


class Code(enum.Enum):
    """The kinds of findings; the value is the word for scripts."""

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
"""Errors that are gone once the image's list of free clusters is dropped."""


_INVALID_L2_CODES: Final = frozenset(
    {Code.L2_RESERVED_BITS, Code.L2_UNALIGNED, Code.L2_OUT_OF_FILE, Code.L2_OVER_METADATA}
)
"""What is wrong with entries that refer to no cluster of the disk's data."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or odd; offsets and lengths in bytes.

    Attributes:
        code: What kind of thing.
        message: One line: what was found where, and what was expected.
        file_offset: Where in the file.
        guest_start: Where on the disk the damage shows, if it does.
        guest_length: How much of the disk it affects.
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
    """The outcome of a check.

    Attributes:
        findings: Up to `MAX_FINDINGS_PER_CODE` findings of each code.
        counts: How many there were of each code; for leaks, how many clusters.
        allocated_clusters: Data clusters that tables refer to.
        file_clusters: Clusters in the file.
        listed_clusters: Free clusters in the image's list; None if it has no list that
            can be read.  They are not leaked.
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
        """How many findings are worse than leaks."""
        return sum(
            number for code, number in self.counts.items() if code.severity is Severity.ERROR
        )

    @property
    def referenced_clusters(self) -> int:
        """How many entries of tables refer to data, those included that cannot be right."""
        return self.allocated_clusters + sum(self.counts.get(code, 0) for code in _INVALID_L2_CODES)

    @property
    def table_errors(self) -> int:
        """How many of the errors are not just about the list of free clusters."""
        return self.errors - sum(self.counts.get(code, 0) for code in FREE_LIST_CODES)

    @property
    def leaks(self) -> int:
        """How many clusters nothing refers to."""
        return self.counts.get(Code.LEAKED_CLUSTERS, 0)

    @property
    def is_implausible(self) -> bool:
        """Whether the tables seem not to be those of the image.

        One flipped bit in the header makes other bytes look like tables: then nearly
        everything in the file seems to be leaked, and the guest's data seems to be bad
        entries.
        """
        suspicious = not self.allocated_clusters or Code.MOSTLY_LEAKED in self.counts
        return suspicious and bool(self.errors or self.leaks)

    @property
    def worst_severity(self) -> Severity | None:
        """The severity of the worst finding; None if there is none at all."""
        return max((code.severity for code in self.counts), default=None)

    def as_json(self) -> dict[str, Any]:
        """Give the report as values that JSON knows."""
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
    """A range of the disk, in bytes, whose content is gone or cannot be trusted.

    It reads as zeros now; only where a table lay over it (`Code.L2_OVER_METADATA`) it
    may read as it did before.
    """

    start: int
    length: int
    code: Code


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair would come to.

    Attributes:
        lost: What would have to be given up.
        copied: Clusters that would get a copy of their own.
        cleared: Entries that would be cleared.
        written: Bytes that would be written, about.
        end: Length that the file would have, in bytes; 0 if nothing is planned.
    """

    lost: tuple[LostRange, ...] = ()
    copied: int = 0
    cleared: int = 0
    written: int = 0
    end: int = 0


@dataclass(slots=True)
class FindingCollector:
    """Findings being collected: counted all, kept some."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Code] = field(default_factory=Counter)

    def remaining(self, code: Code) -> int:
        """Tell how many more findings of a kind are kept."""
        return max(0, MAX_FINDINGS_PER_CODE - self.counts[code])

    def add(self, finding: Finding, count: int = 1) -> None:
        """Count a finding that stands for ``count`` of its kind, and keep it if there is room."""
        if self.remaining(finding.code):
            self.findings.append(finding)
        if count:
            self.counts[finding.code] += count

    def count_only(self, code: Code, count: int) -> None:
        """Count findings that there is no room for."""
        if count:
            self.counts[code] += count
