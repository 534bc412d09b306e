"""Recognising that a failure is due to a lack of file descriptors.

The programs import this module when they start.  Once descriptors are lacking, an import fails,
because reading the module's file needs a descriptor.
"""

from __future__ import annotations

import errno
from typing import Final

_MESSAGES: Final = {
    errno.EMFILE: (
        "open files: found no free descriptor, expected a higher limit "
        "(see: ulimit -n; for a service: LimitNOFILE=)"
    ),
    errno.ENFILE: (
        "open files: found the limit of the host reached, expected a higher one "
        "(see: sysctl fs.file-max)"
    ),
}


def explain_descriptor_limit(error: BaseException) -> str | None:
    """Return a message if ``error`` is a failure by EMFILE or ENFILE, otherwise None."""
    return _MESSAGES.get(error.errno or 0) if isinstance(error, OSError) else None
