"""The kernel's read-ahead on a mount, for sequential readers of a disk.

Each request costs a pass through this process.  With the kernel's default of 128 KiB, eight
requests are sent where one would do.  The length is a property of the mount.  In FUSE INIT
the kernel offers its own length and takes the reply as an upper limit only, so an
unprivileged process can lower it but never raise it (`qedfuse.mount.fuse.fuseinit`).  Only
root can raise it, by writing to a file below ``/sys``.

An open file keeps the length that the mount had when the file was opened.  Therefore the
length must be set before the mount is announced.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, Literal, TypeAlias

_log = logging.getLogger(__name__)

Readahead: TypeAlias = int | Literal["kernel"] | None
"""The option ``readahead``: bytes, the kernel's own length, or None for the default."""

DEFAULT_READAHEAD_BYTES: Final = 1 << 20
"""The size of the largest read request.  A shorter read-ahead would need more requests, and a
longer one would only have several requests in flight."""

_BDI: Final = Path("/sys/class/bdi")
_KIB: Final = 1024


def readahead_bytes(option: Readahead) -> int | None:
    """Return the length in bytes, rounded up to whole pages; None to keep the kernel's own."""
    if option == "kernel":
        return None
    page = os.sysconf("SC_PAGESIZE")
    return -(-(DEFAULT_READAHEAD_BYTES if option is None else option) // page) * page


def set_readahead(device: str, option: Readahead, bdi: Path = _BDI) -> str | None:
    """Set the kernel's read-ahead on a mount, if this process is permitted to.

    A failure is returned and not raised: the mount works without it.

    Args:
        device: The device number of the mount, ``MAJOR:MINOR``.
        option: The length.
        bdi: The directory in which the kernel has a directory for each mount.

    Returns:
        None if the length is as wanted; otherwise one line with the reason and the remedy.
    """
    wanted = readahead_bytes(option)
    if wanted is None:
        return None
    path = bdi / device / "read_ahead_kb"
    found = "an unknown length"
    try:
        number = int(path.read_text())
        if number == wanted // _KIB:
            return None
        found = f"{number} KiB"
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d\n" % (wanted // _KIB))
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        return (
            f"the kernel reads ahead {found}, expected {wanted // _KIB} KiB: {path}: {reason} "
            f"(as root: echo {wanted // _KIB} > {path}; it holds for files opened after that)"
        )
    return None
