"""Checking an image before it is opened for writing, if its tables may be damaged."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING

from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

_log = logging.getLogger(__name__)


async def inspect_image(file: HostFile, header: Header) -> None:
    """Check an image, and refuse it if its tables have errors; change nothing.

    The image must have NEED_CHECK set, or a length that is not a multiple of the cluster size.
    Leaked clusters are only logged, because they cost only space.  Errors of the free list are
    ignored.

    Raises:
        CorruptImageError: The tables have errors.
        HostError: The host cannot read the file.
        NeedsCheckError: The image is too large to be checked in bounded memory.
    """
    # Imported late, because the checker takes long to load, and most images need no check.
    from qedfuse.check.checker import check_image  # noqa: PLC0415
    from qedfuse.check.findings import FREE_LIST_CODES, Severity  # noqa: PLC0415

    reason = "was not closed cleanly" if header.need_check else "has a partial last cluster"
    report = await check_image(file, header)
    # Errors of the free list do not count, because the disk drops an invalid free list.
    if report.table_errors:
        first = next(
            item
            for item in report.findings
            if item.severity is Severity.ERROR and item.code not in FREE_LIST_CODES
        )
        errors = report.table_errors
        counted = f"{errors} errors" if errors > 1 else "1 error"
        msg = (
            f"{file.name}: {reason}: not opened for writing: the check found {counted} "
            f"(first: {first.message}) and leaked clusters: {report.leaks}; nothing has been "
            f"changed; open the image read-only (mount: -o ro), or repair the image: "
            f"qedimg check -r all {shlex.quote(file.name)}"
        )
        raise CorruptImageError(msg)
    if report.leaks:
        _log.warning(
            "%s: %s: leaked clusters found by the check: %d; no errors in the tables",
            file.name,
            reason,
            report.leaks,
        )
    else:
        _log.info(
            "%s: %s: the check found no errors in the tables, and no leaks", file.name, reason
        )
