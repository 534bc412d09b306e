"""Refusing a repair before anything is changed: what it could destroy, and what it costs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CorruptImageError, HostError, NoSpaceError
from qedfuse.hostio.regular import allocated_bytes
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    from typing import Literal

    from qedfuse.check.findings import CheckReport, RepairPlan
    from qedfuse.hostio.posixfile import PosixFile

_ALWAYS_ALLOWED_BYTES: Final = 64 << 20
"""A repair may write this many bytes without ``force``, however small the file is."""


def is_risky(report: CheckReport, level: Literal["leaks", "all"]) -> bool:
    """Return whether a repair could overwrite bytes that are not a table, or reclaim used clusters.

    True if the header seems to name a wrong offset or size of the tables.  With ``leaks`` an image
    that has errors is not changed, so the result is False.
    """
    return report.is_implausible and (level == "all" or not report.errors)


def implausible_message(file: PosixFile, report: CheckReport) -> str:
    """Return the message of a repair that is refused because the header may be wrong."""
    return (
        f"{file.name}: not repaired: found {report.leaks} clusters leaked and "
        f"{report.allocated_clusters} in use, expected more in use; the header may be "
        "damaged and name a wrong offset of the tables (--force repairs anyway)"
    )


def refuse_excess(file: PosixFile, repair_plan: RepairPlan, *, force: bool) -> None:
    """Refuse a repair that writes more than `max_unforced_bytes`, unless ``force`` is True.

    A few bytes of a hostile image can cause thousands of new tables or copies of clusters, which
    would fill the host.
    """
    allowed = max_unforced_bytes(file)
    if repair_plan.written > allowed and not force:
        msg = (
            f"{file.name}: not repaired: found damage that takes "
            f"{format_size(repair_plan.written)} to repair, expected at most "
            f"{format_size(allowed)} for a file of its size (--force repairs anyway)"
        )
        raise CorruptImageError(msg)


def refuse_without_space(file: PosixFile, repair_plan: RepairPlan, backup_bytes: int) -> None:
    """Refuse a repair for which the host has too little space, its backup included.

    The space that a repair needs in the image has two upper limits: the bytes that it writes, and
    the growth of the file.  The first is lower if copies have holes, the second if entries are
    replaced in place.
    """
    try:
        host = os.fstatvfs(file.fd)
    except OSError as error:
        raise HostError.from_os(error, file.name, "statvfs") from error
    available = host.f_bavail * host.f_frsize
    needed = backup_bytes + min(repair_plan.written, max(0, repair_plan.end - file.size()))
    if needed > available:
        msg = (
            f"{file.name}: not repaired: found {format_size(available)} free on the host, expected "
            f"{format_size(needed)} for the repair and its backup"
        )
        raise NoSpaceError(msg)


def max_unforced_bytes(file: PosixFile) -> int:
    """Return the maximum number of bytes that a repair may write without ``force``."""
    return max(_ALWAYS_ALLOWED_BYTES, allocated_bytes(file.stat()))
