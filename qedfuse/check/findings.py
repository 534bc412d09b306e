"""The results of checks and repairs as data, from which text, JSON and exit codes are made."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Final

MAX_FINDINGS_PER_CODE: Final = 50
"""Maximum number of findings of each code that are kept; further ones are only counted."""


class Severity(enum.IntEnum):
    """How bad a finding is."""

    NOTE = 0
    """Unusual, but harmless."""
    LEAK = 1
    """Clusters of the file that nothing refers to."""
    ERROR = 2
    """A table or the free list is invalid.  Data may be lost, or may be overwritten later."""


class Code(enum.Enum):
    """The kinds of findings; the value of each kind is its name in JSON."""

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
    FREE_LIST_CONTRADICTED = "free-list-contradicted"  # a table entry points to a listed cluster
    LEAKED_CLUSTERS = "leaked-clusters"
    HEADER_SIZE_ZERO = "header-size-zero"
    NAME_IN_FIXED_HEADER = "backing-name-in-fixed-header"
    BACKING_NAME_EMPTY = "backing-name-empty"
    NO_PROBE_WITHOUT_BACKING = "no-probe-without-backing"
    NEED_CHECK_SET = "need-check-set"
    UNKNOWN_COMPAT = "unknown-compat-bits"
    UNKNOWN_AUTOCLEAR = "unknown-autoclear-bits"
    ODD_TAIL = "odd-tail"  # the file ends within a cluster
    PAST_IMAGE_SIZE = "data-past-image-size"
    MOSTLY_LEAKED = "mostly-leaked"

    @property
    def severity(self) -> Severity:
        """The severity of all findings of this kind."""
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
"""Errors that concern only the persistent free list."""


_INVALID_L2_CODES: Final = frozenset(
    {Code.L2_RESERVED_BITS, Code.L2_UNALIGNED, Code.L2_OUT_OF_FILE, Code.L2_OVER_METADATA}
)
"""Errors of L2 entries that refer to no data cluster.  L2_CUT_SHORT is missing here, because such
an entry refers to a part of a cluster."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One error, leak or note, or several of one kind; offsets and lengths in bytes.

    Attributes:
        code: The kind of the finding.
        message: One line that says where the finding is, what was found, and what was expected.
        file_offset: Value of a table entry, valid or not; file offset of the first leaked cluster,
            if known; None for all other findings.
        guest_start: If the finding is about one table entry, the guest offset of the range that the
            entry describes; None for other findings.
        guest_length: Length of that range; None if ``guest_start`` is None.
    """

    code: Code
    message: str
    file_offset: int | None = None
    guest_start: int | None = None
    guest_length: int | None = None

    @property
    def severity(self) -> Severity:
        """The severity of the finding."""
        return self.code.severity


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of a check.

    Attributes:
        findings: Up to `MAX_FINDINGS_PER_CODE` findings of each code.
        counts: For each code with findings their number, including those that are not kept.  For
            leaks it is the number of leaked clusters.
        allocated_clusters: Number of L2 entries that refer to a data cluster in the file.
        file_clusters: Number of whole clusters in the file.
        listed_clusters: Number of clusters in the persistent free list; they do not count as
            leaked.  None without a valid list.
        past_end_clusters: How many of ``allocated_clusters`` lie past the end of the disk.
        hidden_findings: Number of findings that no kept finding describes.
        fragmented_clusters: Number of L2 entries whose cluster does not lie in the file directly
            after the cluster of the previous entry of their table.  Entries without an offset are
            skipped.
    """

    findings: tuple[Finding, ...]
    counts: dict[Code, int]
    allocated_clusters: int
    file_clusters: int
    listed_clusters: int | None = None
    fragmented_clusters: int = 0
    past_end_clusters: int = 0
    hidden_findings: int = 0

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
        """The number of errors, without those of the persistent free list (`FREE_LIST_CODES`)."""
        return self.errors - sum(self.counts.get(code, 0) for code in FREE_LIST_CODES)

    @property
    def leaks(self) -> int:
        """The number of clusters that nothing refers to."""
        return self.counts.get(Code.LEAKED_CLUSTERS, 0)

    @property
    def is_implausible(self) -> bool:
        """Whether the bytes that were read as tables are probably something else.

        One flipped bit in the header can make the check read other bytes of the file as tables.
        """
        suspicious = not self.allocated_clusters or Code.MOSTLY_LEAKED in self.counts
        return suspicious and bool(self.errors or self.leaks)

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
    """A range of the disk whose data is lost or possibly wrong.

    After the repair the range reads as zeros, or perhaps as before if a table overlapped its data
    (`Code.L2_OVER_METADATA`).  If there are too many ranges to list, the last one stands for
    several, and includes the intact data between them.

    Attributes:
        start: Guest offset in bytes.
        length: Length in bytes.
        code: The error because of which the data is lost or possibly wrong.
    """

    start: int
    length: int
    code: Code


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """The changes that a repair would make.

    Attributes:
        lost: Ranges whose data would be lost or possibly wrong.
        copied: Number of data clusters that would be copied.
        cleared: Number of entries that would be cleared.
        written: Approximate number of bytes that would be written.
        end: Length of the file in bytes after the repair; 0 if nothing is planned.
    """

    lost: tuple[LostRange, ...] = ()
    copied: int = 0
    cleared: int = 0
    written: int = 0
    end: int = 0


@dataclass(slots=True)
class FindingCollector:
    """Collects findings; all are counted, but only the first of each code are kept.

    Attributes:
        findings: The findings that are kept, at most `MAX_FINDINGS_PER_CODE` of each code.
        counts: Number of all findings of each code.
        hidden: Number of findings that no kept finding describes.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Code] = field(default_factory=Counter)
    hidden: int = 0
    _kept: Counter[Code] = field(default_factory=Counter)

    def remaining(self, code: Code) -> int:
        """Return how many further findings of a code would be kept; 0 if the limit is reached."""
        return max(0, MAX_FINDINGS_PER_CODE - self._kept[code])

    def add(self, finding: Finding, count: int = 1) -> None:
        """Count ``count`` findings; keep ``finding`` for all of them if `remaining` permits it."""
        if not self.remaining(finding.code):
            self.count_only(finding.code, count)
            return
        self.findings.append(finding)
        self._kept[finding.code] += 1
        self.counts[finding.code] += count

    def count_only(self, code: Code, count: int) -> None:
        """Count ``count`` findings of a code, and keep none of them."""
        if count:
            self.counts[code] += count
            self.hidden += count
