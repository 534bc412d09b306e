"""The kernel's read-ahead on a mount, for sequential readers of a disk.

Each read request costs the server a fixed time.  With a read-ahead of 128 KiB, the kernel's
default, a program that reads 512 KiB causes four requests instead of one.

The read-ahead is a property of the mount.  An unprivileged server can lower it in FUSE INIT but
never raise it (`qedfuse.mount.fuse.fuseinit`).  Only root can raise it, by writing to a file below
``/sys``.

An open file keeps the read-ahead that the mount had when the file was opened.  Therefore the
read-ahead must be set before the mount is announced.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal, TypeAlias

Readahead: TypeAlias = int | Literal["kernel"] | None
"""The option ``readahead``: a number of bytes, ``kernel`` to keep the kernel's own read-ahead, or
None for `DEFAULT_READAHEAD_BYTES`."""

DEFAULT_READAHEAD_BYTES: Final = 1 << 19
"""The read-ahead that a mount gets without the option ``readahead``.

This is the maximum length of a read that the C extension answers by splicing pages of the host's
page cache (``MAX_SPLICE_BYTES`` in ``_extraops.h``).  A longer read-ahead gains nothing, because
the extension limits all read requests to this length (``_maxread.c``)."""

_BDI: Final = Path("/sys/class/bdi")
"""The directory with a subdirectory for each backing device; a FUSE mount is such a device."""
_KIB: Final = 1024


def readahead_bytes(option: Readahead) -> int | None:
    """Return the read-ahead for a value of the option, in bytes, rounded up to whole pages.

    The result is None if the kernel must keep its own read-ahead.
    """
    if option == "kernel":
        return None
    page = os.sysconf("SC_PAGESIZE")
    return -(-(DEFAULT_READAHEAD_BYTES if option is None else option) // page) * page


def set_readahead(device: str, option: Readahead, bdi: Path = _BDI) -> str | None:
    """Set the kernel's read-ahead on a mount, unless the kernel refuses.

    Args:
        device: The device number of the mount, ``MAJOR:MINOR``.
        option: The value of the option ``readahead``.
        bdi: See `_BDI`.

    Returns:
        None after a success, or if ``option`` is ``kernel``.  After a failure, one line with the
        reason and the command by which root can set the read-ahead.
    """
    wanted_bytes = readahead_bytes(option)
    if wanted_bytes is None:
        return None
    wanted_kib = wanted_bytes // _KIB
    path = bdi / device / "read_ahead_kb"
    found = "an unknown length"
    try:
        found_kib = int(path.read_text())
        if found_kib == wanted_kib:
            return None
        found = f"{found_kib} KiB"
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d\n" % wanted_kib)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        return (
            f"the kernel reads ahead {found}, expected {wanted_kib} KiB: {path}: {reason} "
            f"(as root: echo {wanted_kib} > {path}; open files keep the old length)"
        )
    return None
