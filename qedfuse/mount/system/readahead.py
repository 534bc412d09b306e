"""How far the kernel reads ahead of whoever reads a disk in order.

Each request costs a way through this process, and the kernel's own 128 KiB make eight of
them where one would do.  The length belongs to the mount: in the handshake the kernel
offers what it has, and takes an answer for an upper limit only, so a process without
powers can have less of it but never more (`qedfuse.mount.fuse.fuseinit`).  More is to be had
from root alone, who writes it to a file below ``/sys``.

A file takes the length over when it is opened; so it has to be right before anybody
learns of the mount.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, Literal, TypeAlias

_log = logging.getLogger(__name__)

Readahead: TypeAlias = int | Literal["kernel"] | None
"""What a user may ask for: bytes; the kernel's own; None for what is good for most."""

DEFAULT_READAHEAD: Final = 1 << 20
"""Bytes: the longest read request there is, so less makes more of them, and more only
keeps several of them under way."""

_BDI: Final = Path("/sys/class/bdi")
_KIB: Final = 1024


def readahead_bytes(option: Readahead) -> int | None:
    """Give the length in bytes, in whole pages; None if the kernel's is to stay."""
    if option == "kernel":
        return None
    page = os.sysconf("SC_PAGESIZE")
    return -(-(DEFAULT_READAHEAD if option is None else option) // page) * page


def set_readahead(device: str, option: Readahead, bdi: Path = _BDI) -> str | None:
    """Have the kernel read ahead on a mount as far as it should, if it can be had.

    Nothing depends on it, so what goes wrong is told and no more.

    Args:
        device: The mount's ``MAJOR:MINOR``.
        option: How far.
        bdi: Where the kernel keeps a directory for each mount.

    Returns:
        What is wrong and what root can do, in one line, or None.
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
