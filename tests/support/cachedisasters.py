"""Disasters of the cache's disk: a file system of its own, and bytes that change on the disk."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class MountedTmpfs:
    """A tmpfs for a block, if the host permits that; otherwise only a directory."""

    def __init__(self, path: Path, options: str) -> None:
        self._path = path
        self._options = options
        self._is_mounted = False

    def __enter__(self) -> bool:
        self._path.mkdir(mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", self._options, "qedfuse-test", str(self._path)]
        done = subprocess.run(mount, check=False, stderr=subprocess.DEVNULL)
        self._is_mounted = not done.returncode
        return self._is_mounted

    def __exit__(self, *_: object) -> None:
        if self._is_mounted:
            subprocess.run(["umount", "-l", self._path], check=True)
        shutil.rmtree(self._path)


def write_to_disk(file: int, offset: int, bit: int) -> None:
    """Change a block of an open file: flip bit ``bit`` of the block.

    With ``bit`` 0 the block is replaced by the first block of the file, with bit 0 flipped.  The
    write bypasses the page cache, if the file system permits that.
    """
    try:
        fd = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_DIRECT)
    except OSError:
        fd = os.dup(file)
    with mmap.mmap(-1, 4096) as block:
        os.preadv(fd, [block], offset if bit else 0)
        block[bit // 8] ^= 1 << (bit % 8)
        os.pwritev(fd, [block], offset)
    os.close(fd)
