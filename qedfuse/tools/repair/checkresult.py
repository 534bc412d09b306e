"""The result of checking or repairing an image.

A separate module, so that `qedimg check` can use the result of a fast check without loading
numpy and trio, which the full check needs (`qedfuse.tools.repair.imagecheck`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Self

from qedfuse.check.findings import CheckReport, LostRange, RepairPlan

if TYPE_CHECKING:
    from qedfuse.ondisk.header import Header


class KeepReason(Enum):
    """Why a repair keeps leaked clusters.

    Attributes:
        REPAIR: They may hold data that this or an earlier repair lost.
        HARD_LINKS: The image has several hard links.  So an earlier repair may have saved its
            backup beside another one, where it is not found.
    """

    REPAIR = auto()
    HARD_LINKS = auto()


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The reports of a check before and after a repair, and the changes by the repair.

    Attributes:
        before: Report of the check before the repair; after an undo the same as ``after``.
        after: Report of the last check; the same as ``before`` if nothing was repaired.
        total_clusters: Number of clusters of the disk.
        bytes_before: Length of the file in bytes before the repair or undo.
        bytes_after: Length of the file in bytes after the repair or undo.
        plan: The changes that the repair of errors has made, or would make if ``dry``.
        backup: Path of the backup that the repair has made; None if no backup was made.
        dry: Whether the repair was only planned, and nothing was changed.
        needs_force: Whether `qedfuse.tools.repair.imagecheck.repair` would refuse the planned
            repair without ``force``.
        keep_reason: Why leaked clusters were kept (if ``dry``: would be kept); None if none were.
        undone: Number of ranges that were restored; 0 unless a repair was undone.
    """

    before: CheckReport
    after: CheckReport
    total_clusters: int
    bytes_before: int
    bytes_after: int
    plan: RepairPlan
    backup: str | None = None
    dry: bool = False
    needs_force: bool = False
    keep_reason: KeepReason | None = None
    undone: int = 0

    @classmethod
    def of_check(
        cls,
        header: Header,
        size: int,
        report: CheckReport,
        **more: Any,  # noqa: ANN401  fields
    ) -> Self:
        """Return a result with one report: no repair has been made, or it was undone.

        Args:
            header: The header of the image.
            size: Length of the file in bytes.
            report: The report of the only check, or of the check after the undo.
            more: Further attributes of the result.
        """
        total = header.geometry.clusters(header.image_size)
        return cls(report, report, total, size, size, **{"plan": RepairPlan(), **more})

    @property
    def errors_fixed(self) -> int:
        """The errors in the first check minus those in the last check; at least 0."""
        return max(0, self.before.errors - self.after.errors)

    @property
    def leaks_fixed(self) -> int:
        """The leaked clusters in the first check minus those in the last check; at least 0.

        This includes clusters that are in use, but counted as leaked because the check before the
        repair did not read their L2 table, which was not valid: it overlapped another table, for
        example, or the end of the file cut it short.
        """
        return max(0, self.before.leaks - self.after.leaks)

    @property
    def lost(self) -> tuple[LostRange, ...]:
        """The ranges of the disk whose data is lost, or possibly wrong, after the repair."""
        return self.plan.lost
