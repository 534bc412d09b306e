"""Reads a disk in a process of its own, which can be given up if the disk hangs.

    python -m benchmarks.reader check DISK EXPECTED [BLOCK]
    python -m benchmarks.reader walk DISK SECONDS
    python -m benchmarks.reader forget DISK

"check" compares the whole disk with a flat file ("-": zeros), by several readers at once
and not in order; of one of more than 2 GiB that was only read from, a part.  A block of BLOCK bytes
may hold what fio wrote there instead; how many do is printed.  "walk" goes from data to
hole and on, over and over, and prints walks a second.  "drop-cache" takes the disk out of the
page cache.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK_BYTES: Final = 1 << 20
MAX_CHUNKS_COMPARED: Final = 2048
"""From so many on a disk that was only read from is not compared as a whole."""
SAMPLED_CHUNKS: Final = 256
SMALL_BYTES: Final = 4096
SMALL_READS: Final = 4096
READERS: Final = 16
WRONG_PREFIX: Final = "wrong data: "
"""What is printed instead of a number begins like this if the disk is not as expected."""
MARKER: Final = b"qedfuse!"
"""Follows the offset of the request in what fio writes, up to the end of the request."""


def written(offset: int, length: int) -> bytes:
    """Give what a write request of fio's holds; see `benchmarks.loads`."""
    return (offset.to_bytes(8, "little") + MARKER) * (length // 16)


def compare(found: bytes, expected: bytes, offset: int, block: int) -> int:
    """Count the blocks that hold what fio wrote; all others must be as expected.

    Raises:
        ValueError: Some are neither; the message says where and what.
    """
    if found == expected:
        return 0
    blocks = 0
    for start in range(0, len(expected), block or len(expected)):
        end = start + (block or len(expected))
        part, wanted = found[start:end], expected[start:end]
        if part == wanted:
            continue
        if block and part == written(offset + start, block):
            blocks += 1
            continue
        if len(part) != len(wanted):
            msg = f"offset {offset + start}: found {len(part)} bytes, expected {len(wanted)}"
            raise ValueError(msg)
        at = next(at for at, pair in enumerate(zip(part, wanted, strict=True)) if len({*pair}) > 1)
        msg = (
            f"offset {offset + start + at}: found {part[at : at + 16].hex()}, "
            f"expected {wanted[at : at + 16].hex()}"
        )
        if block:
            msg += f" or {written(offset + start, block)[at : at + 16].hex()}"
        raise ValueError(msg)
    return blocks


def check(disk: str, expected: str, block: int, flags: int = os.O_DIRECT) -> int:
    """Compare a whole disk; give the number of blocks that hold what fio wrote.

    Raises:
        ValueError: Some other data was found.
    """
    with ExitStack() as stack:
        file = stack.enter_context(os.fdopen(os.open(disk, os.O_RDONLY | flags), "rb", 0))
        size = os.fstat(file.fileno()).st_size
        reference = None if expected == "-" else stack.enter_context(Path(expected).open("rb", 0))
        if reference is not None and (length := os.fstat(reference.fileno()).st_size) != size:
            msg = f"size: found {size}, expected {length}"
            raise ValueError(msg)

        def look(offset: int, length: int) -> int:
            length = min(length, size - offset)
            wanted = os.pread(reference.fileno(), length, offset) if reference else bytes(length)
            return compare(_read(file.fileno(), offset, length), wanted, offset, block)

        order = random.Random(3)
        large = list(range(0, size, CHUNK_BYTES))
        order.shuffle(large)
        if len(large) > MAX_CHUNKS_COMPARED and not block:
            large = [*large[:SAMPLED_CHUNKS], (size - 1) // CHUNK_BYTES * CHUNK_BYTES]
        # Several at a time of those that the loads use as well: what is mixed up when
        # requests overlap would not show if they came one by one.
        count = 0 if block > SMALL_BYTES else SMALL_READS
        small = [order.randrange(size // SMALL_BYTES) * SMALL_BYTES for _ in range(count)]
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda offset: look(offset, SMALL_BYTES), small):
                pass
            pieces = dict.fromkeys(large)
            return sum(pool.map(lambda offset: look(offset, CHUNK_BYTES), pieces))


def _read(descriptor: int, offset: int, length: int) -> bytes:
    """Read into memory that begins at a page, as O_DIRECT wants it."""
    with mmap.mmap(-1, length) as buffer:
        count = os.preadv(descriptor, [buffer], offset)
        return buffer[:count]


def walk(disk: str, seconds: float) -> float:
    """Give how many times a second all the borders between data and holes are found.

    Raises:
        ValueError: They are not where the disk has them.
    """
    descriptor = os.open(disk, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    expected = [0, size - 65536, size]
    count = 0
    start = time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        borders = [0]
        while borders[-1] < size:
            data = os.lseek(descriptor, borders[-1], os.SEEK_DATA)
            borders += [data, os.lseek(descriptor, data, os.SEEK_HOLE)]
        if borders != expected:
            msg = f"holes: found borders {borders}, expected {expected}"
            raise ValueError(msg)
        count += 1
    return count / passed


def drop_cache(disk: str) -> float:
    """Take a disk out of the page cache of its mount."""
    descriptor = os.open(disk, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return 0


def main() -> None:
    """Do one thing and print a number, or say in one line what is wrong."""
    word, disk, *rest = sys.argv[1:]
    actions: dict[str, Callable[[], float]] = {
        "check": lambda: check(disk, rest[0], int((rest[1:] or ["0"])[0])),
        "walk": lambda: walk(disk, float(rest[0])),
        "drop-cache": lambda: drop_cache(disk),
    }
    try:
        print(actions[word]())
    except ValueError as error:
        print(f"{WRONG_PREFIX}{disk}: {error}")
    except OSError as error:
        sys.exit(f"{disk}: {error}")


if __name__ == "__main__":
    main()
