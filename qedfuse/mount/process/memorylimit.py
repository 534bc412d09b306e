"""A hard limit on the address space of the server (RLIMIT_AS), for services.

If the process needs more address space than the limit permits, the kernel refuses to give it, and a
request or the mount fails.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

from qedfuse.errors import HostError, UsageError

_RESERVE_BYTES: Final = 512 << 20
"""Address space for further threads, their heaps and libraries.  Most of it is never used, but the
C library reserves 64 MiB for each arena of its heap."""
_STATM: Final = Path("/proc/self/statm")
_MIB: Final = 1 << 20


def limit_memory(limit_bytes: int, statm: Path = _STATM) -> None:
    """Limit the address space of this process; child processes inherit the limit.

    Args:
        limit_bytes: The limit in bytes.
        statm: The file with the present size of the process, in pages.

    Raises:
        UsageError: The limit is too low for the program itself.
        HostError: /proc is not mounted, or the present hard limit is lower than ``limit_bytes``.
    """
    try:
        present_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
    except OSError as error:
        raise HostError.from_os(error, str(statm), "cannot read") from error
    needed_mib = -(-(present_bytes + _RESERVE_BYTES) // _MIB)
    if limit_bytes < needed_mib * _MIB:
        msg = (
            f"option memory_limit: found {limit_bytes // _MIB} MiB, expected at least "
            f"{needed_mib} MiB of address space for the program itself"
        )
        raise UsageError(msg)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    except (OSError, ValueError) as error:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        msg = f"option memory_limit: found a hard limit of {hard} bytes, expected a higher one"
        raise HostError(msg) from error
