"""The check of an image that needs one before it is opened for writing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qedfuse.check.findings import FREE_LIST_CODES, Severity
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

_log = logging.getLogger(__name__)


async def inspect_image(file: HostFile, header: Header) -> None:
    """Check an image, and refuse it if it has errors.

    Leaked clusters cost only space, so they are only logged.

    Raises:
        CorruptImageError: The check found errors.  Nothing has been changed.
    """
    # Imported here: the checker takes long to load, and most opens do not need it.
    from qedfuse.check.checker import check_image  # noqa: PLC0415

    why = "was not closed cleanly" if header.need_check else "has no whole number of clusters"
    report = await check_image(file, header)
    # The disk itself drops an invalid free list.
    if report.table_errors:
        first = next(
            item
            for item in report.findings
            if item.severity is Severity.ERROR and item.code not in FREE_LIST_CODES
        )
        errors = report.table_errors
        found = f"{errors} errors" if errors > 1 else "1 error"
        msg = (
            f"{file.name}: {why}: not opened for writing: the check found {found} "
            f"(first: {first.message}) and leaked clusters: {report.leaks}; nothing has been "
            f"changed; mount it read-only with -o ro, or repair it: qedimg check -r all "
            f"{file.name}"
        )
        raise CorruptImageError(msg)
    if report.leaks:
        _log.warning(
            "%s: %s: leaked clusters found by the check: %d; nothing worse",
            file.name,
            why,
            report.leaks,
        )
    else:
        _log.info("%s: %s: the check found nothing wrong", file.name, why)
