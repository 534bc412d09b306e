"""What a file is: opened whatever it is called, and its format told by its first bytes."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from qedfuse.errors import HostError, ImageError, UsageError, cannot_open
from qedfuse.hostio.regular import KINDS
from qedfuse.ondisk.formats import SIGNATURE_BYTES, foreign, is_luks, is_qed
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from typing import Literal


def probe(path: str) -> Literal["raw", "qed"]:
    """Tell the format of a file by its first bytes.

    Raises:
        UsageError: It is an image of a foreign format.
        HostError: It cannot be opened or read.
        ImageError: It is neither a regular file nor a block device.
    """
    fd = open_raw(path, os.O_RDONLY)
    try:
        start = os.pread(fd, SIGNATURE_BYTES, 0)
    except OSError as error:
        raise HostError.from_os(error, printable(path), "read") from error
    finally:
        os.close(fd)
    return judge_start(start, printable(path))


def judge_start(start: bytes | bytearray | memoryview, name: str) -> Literal["raw", "qed"]:
    """Tell the format of what begins with some bytes.

    Raises:
        UsageError: It is an image of a foreign format.
    """
    start = bytes(start[:SIGNATURE_BYTES])
    if is_qed(start):
        return "qed"
    found = "LUKS" if is_luks(start) else foreign(start)
    if found is not None:
        msg = (
            f"{name}: format: found {found}, expected raw or qed (-f raw takes the bytes as "
            "they are; qemu-img convert reads it)"
        )
        raise UsageError(msg)
    return "raw"


def open_raw(path: str, access: int) -> int:
    """Open a regular file or a block device, and nothing that only looks like one.

    Raises:
        HostError: It cannot be opened.
        ImageError: It is something else.
    """
    flags = access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        # O_PATH opens nothing, so looking at a FIFO has no effect on it.
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise cannot_open(path, error) from error
    try:
        kind = stat.S_IFMT(os.fstat(handle).st_mode)
        if kind not in {stat.S_IFREG, stat.S_IFBLK}:
            found = KINDS.get(kind, "a special file")
            msg = f"{printable(path)}: found {found}, expected a file or a block device"
            raise ImageError(msg)
        return os.open(f"/proc/self/fd/{handle}", flags)
    except OSError as error:
        raise cannot_open(path, error) from error
    finally:
        os.close(handle)
