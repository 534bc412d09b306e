"""What happens before a writable mount of an image that was not closed cleanly."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header

_log = logging.getLogger(__name__)


async def inspect_image(file: HostFile, header: Header) -> None:
    """Check an image; go on if nothing worse than leaks is found, which cost only space.

    Raises:
        CorruptImageError: There is more.  Nothing has been changed.
    """
    # The checker is large, and most mounts do not need it.
    from qedfuse.check.walk import check_image  # noqa: PLC0415

    report = await check_image(file, header)
    if report.errors:
        first = max(report.findings, key=lambda finding: finding.severity)
        found = f"{report.errors} errors" if report.errors > 1 else "1 error"
        msg = (
            f"{file.name}: not mounted for writing: was not closed cleanly; the check found "
            f"{found} (first: {first.message}) and {report.leaks} leaked clusters; nothing has "
            "been changed; mount it read-only with -o ro, or repair it with: "
            f"qedimg check -r all {file.name}"
        )
        raise CorruptImageError(msg)
    if report.leaks:
        _log.warning(
            "%s: was not closed cleanly: the check found %d leaked clusters and nothing worse",
            file.name,
            report.leaks,
        )
    else:
        _log.info("%s: was not closed cleanly: the check found nothing wrong", file.name)
