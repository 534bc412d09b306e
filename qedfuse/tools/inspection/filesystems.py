"""The file system in a partition, with its label and UUID, as blkid(8) recognises them.

blkid gets a sparse file (memfd) as long as the partition.  It has only the first 2 MiB and the last
1 MiB of the partition's data, where file systems have their superblocks.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from qedfuse.partitions.partition import ReadDisk

_HEAD_BYTES: Final = 2 << 20
"""How many of the first bytes blkid gets.  ZFS has labels in the first and last 512 KiB."""
_TAIL_BYTES: Final = 1 << 20
_TIMEOUT_SECONDS: Final = 10.0
_MAX_OUTPUT_BYTES: Final = 1 << 16
_PROGRAM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Where blkid is looked for; the PATH of an ordinary user may lack the first directory."""


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What blkid has recognised: a file system, or for example swap or an encrypted volume.

    Attributes:
        type: The type by its name in blkid: ``ext4``, ``ntfs``, ``swap``.
        label: The label; empty if there is none.
        uuid: The UUID or the serial number as blkid writes it; empty if there is none.
    """

    type: str
    label: str = ""
    uuid: str = ""


async def find_file_system(read: ReadDisk, start: int, length: int) -> FileSystem | None:
    """Return the file system in a range of a disk, as blkid recognises it.

    Returns None if blkid is missing, fails, takes too long, or recognises nothing.

    Args:
        read: Reads the disk.
        start: Guest offset in bytes where the range begins.
        length: Bytes in the range.

    Raises:
        QedError: The disk cannot be read.
    """
    head = await read(start, min(length, _HEAD_BYTES))
    tail_at = max(len(head), length - _TAIL_BYTES)
    tail = await read(start + tail_at, length - tail_at) if length > tail_at else b""
    return await run_in_thread(_ask_blkid, head, tail_at, tail, length)


def _ask_blkid(head: bytes, tail_at: int, tail: bytes, length: int) -> FileSystem | None:
    """Return what blkid recognises in a partition of ``length`` bytes; None if it fails.

    ``head`` and ``tail`` are its first and last bytes; ``tail_at`` is the distance of ``tail`` from
    the beginning.
    """
    try:
        fd = os.memfd_create("partition", os.MFD_CLOEXEC)
        with open(fd, "r+b", buffering=0) as file:  # noqa: PTH123  a descriptor
            file.truncate(length)
            file.write(head)
            file.seek(tail_at)
            file.write(tail)
            kind = _value(fd, "TYPE")
            if not kind:
                return None
            return FileSystem(kind, _value(fd, "LABEL"), _value(fd, "UUID"))
    except (OSError, subprocess.SubprocessError):
        return None


def _value(fd: int, name: str) -> str:
    """Return one value that blkid finds in the file ``fd``; empty if blkid does not find it.

    Bytes that are not valid UTF-8 become U+FFFD, for example umlauts in the label of a FAT.

    Raises:
        OSError: The program cannot be started.
        SubprocessError: The program takes too long.
    """
    # One value per call, because only the format "value" prints the bytes unchanged.  In the format
    # "export" a control character and "^" with a letter look alike, and "udev" cuts long labels.
    completed = subprocess.run(  # noqa: S603  a fixed program, which gets a descriptor
        [
            *("blkid", "--probe", "--match-tag", name, "--output", "value"),
            f"/proc/self/fd/{fd}",
        ],
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=_TIMEOUT_SECONDS,
        env={"PATH": _PROGRAM_PATH, "LC_ALL": "C"},
        check=False,
    )
    if completed.returncode != 0:
        return ""
    return completed.stdout[:_MAX_OUTPUT_BYTES].removesuffix(b"\n").decode(errors="replace")
