"""What checking the image at a path came to.

It stands by itself because it must be at hand without loading what a check takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from qedfuse.check.findings import CheckReport, LostRange, RepairPlan

if TYPE_CHECKING:
    from qedfuse.ondisk.header import Header


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found, what was done about it, and what is left.

    Attributes:
        before: What was found first.
        after: What is left; the same as ``before`` if nothing was to be done.
        total_clusters: Clusters of the disk.
        bytes_before: Length of the file when it was found.
        bytes_after: Length of the file now.
        plan: What a repair would do to the tables, or has done.
        backup: The file with the old tables, if any was changed.
        dry: Whether the plan was only made.
        needs_force: Whether the plan is refused unless it is forced.
        leaks_kept: Whether leaks are left, or would be, since a repair may have made them.
        undone: How many pieces were put back, if a repair was undone.
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
        """Sum up a check that has changed nothing, of a file of ``size`` bytes."""
        total = header.geometry.clusters(header.image_size)
        return cls(report, report, total, size, size, **{"plan": RepairPlan(), **more})

    @property
    def errors_fixed(self) -> int:
        """How many errors have gone."""
        return max(0, self.before.errors - self.after.errors)

    @property
    def leaks_fixed(self) -> int:
        """How many of the leaked clusters that were found first have gone."""
        return max(0, self.before.leaks - self.after.leaks)

    @property
    def lost(self) -> tuple[LostRange, ...]:
        """The ranges of the disk that are damaged, or would be lost in a repair."""
        return self.plan.lost
