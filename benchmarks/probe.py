"""Read and write single blocks of a disk, in a process that can be killed if it hangs.

    python -m benchmarks.probe first DISK OFFSETS
    python -m benchmarks.probe read DISK OFFSETS SECONDS
    python -m benchmarks.probe write DISK OFFSETS

OFFSETS is a file of 64-bit numbers.  "first" opens the disk, reads one block and prints the
seconds that this took.  "read" reads the blocks one after the other, repeatedly, and prints
reads per second.  "write" writes each block once, then flushes, and prints the seconds of
both.  Blocks have 4096 bytes, and are read and written with O_DIRECT.  Each begins with its own
offset, and a read verifies that.
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
import time
from array import array
from pathlib import Path
from typing import Final

from benchmarks.reader import MARKER, WRONG_PREFIX

BLOCK_BYTES: Final = 4096


def stamp(offset: int) -> bytes:
    """Return the first bytes of the block at an offset."""
    return offset.to_bytes(8, "little") + MARKER


def _read(descriptor: int, buffer: mmap.mmap, offset: int) -> None:
    """Read a block into ``buffer``.

    Raises:
        ValueError: The block is that of another offset.
    """
    os.preadv(descriptor, [buffer], offset)
    if buffer[:16] != stamp(offset):
        msg = f"offset {offset}: found {buffer[:16].hex()}, expected {stamp(offset).hex()}"
        raise ValueError(msg)


def first(disk: str, offsets: array[int]) -> str:
    """Open the disk and read the first block; return the seconds."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    began = time.monotonic()
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    _read(descriptor, buffer, offsets[0])
    return f"{time.monotonic() - began}"


def read(disk: str, offsets: array[int], seconds: float) -> str:
    """Read each block once, then read blocks for ``seconds``; return reads per second."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    end = time.monotonic() + seconds
    for offset in offsets:
        _read(descriptor, buffer, offset)
        if time.monotonic() >= end:
            break
    began = time.monotonic()
    passed = 0.0
    for count, offset in enumerate(itertools.cycle(offsets), 1):
        _read(descriptor, buffer, offset)
        passed = time.monotonic() - began
        if passed >= seconds:
            return f"{count / passed}"
    return "0"


def write(disk: str, offsets: array[int]) -> str:
    """Write each block, then flush; return the seconds of both."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    descriptor = os.open(disk, os.O_RDWR | os.O_DIRECT)
    began = time.monotonic()
    for offset in offsets:
        buffer[:16] = stamp(offset)
        os.pwritev(descriptor, [buffer], offset)
    written = time.monotonic()
    os.fsync(descriptor)
    return f"{written - began} {time.monotonic() - written}"


def main() -> None:
    """Run one action and print its figures, or one line about wrong data."""
    word, disk, name, *rest = sys.argv[1:]
    offsets = array("Q", Path(name).read_bytes())
    try:
        if word == "first":
            print(first(disk, offsets))
        elif word == "read":
            print(read(disk, offsets, float(rest[0])))
        else:
            print(write(disk, offsets))
    except ValueError as error:
        print(f"{WRONG_PREFIX}{disk}: {error}")
    except OSError as error:
        sys.exit(f"{disk}: {error}")


if __name__ == "__main__":
    main()
