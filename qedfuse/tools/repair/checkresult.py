"""The result of checking or repairing an image.

A module of its own, because commands need it without loading what a check needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from qedfuse.check.findings import CheckReport, LostRange, RepairPlan

if TYPE_CHECKING:
    from qedfuse.ondisk.header import Header


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found, what a repair did, and what is left.

    Attributes:
        before: What the check found first.
        after: What is left; the same as ``before`` if nothing was repaired.
        total_clusters: Clusters of the disk.
        bytes_before: Length of the file before.
        bytes_after: Length of the file afterwards.
        plan: What a repair would change in the tables, or has changed.
        backup: Path of the backup; None if no table was changed.
        dry: Whether the plan was made and not carried out.
        needs_force: Whether a repair is refused unless it is forced.
        leaks_kept: Whether leaks are kept, or would be, because a repair may have caused
            them.
        undone: Number of ranges that were restored, if a repair was undone.
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
    leaks_kept: bool = False
    undone: int = 0

    @classmethod
    def of_check(
        cls,
        header: Header,
        size: int,
        report: CheckReport,
        **more: Any,  # noqa: ANN401  fields
    ) -> Self:
        """Return the result of a check that has changed nothing, of a file of ``size`` bytes."""
        total = header.geometry.clusters(header.image_size)
        return cls(report, report, total, size, size, **{"plan": RepairPlan(), **more})

    @property
    def errors_fixed(self) -> int:
        """Number of errors that were repaired."""
        return max(0, self.before.errors - self.after.errors)

    @property
    def leaks_fixed(self) -> int:
        """Number of leaked clusters that were reclaimed."""
        return max(0, self.before.leaks - self.after.leaks)

    @property
    def lost(self) -> tuple[LostRange, ...]:
        """The ranges of the disk that are damaged, or would be lost by a repair."""
        return self.plan.lost
