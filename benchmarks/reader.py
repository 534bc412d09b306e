"""Read a disk, in a process that can be killed if the disk hangs.

    python -m benchmarks.reader check DISK EXPECTED [BLOCK]
    python -m benchmarks.reader walk DISK SECONDS
    python -m benchmarks.reader drop-cache DISK

"check" compares the whole disk with a flat file ("-" stands for zeros), with concurrent
reads in random order; of a disk of more than 2 GiB that was not written to, it compares a
sample.  A block of BLOCK bytes may hold what fio wrote there instead; the number of such
blocks is printed.  "walk" finds all holes with lseek, repeatedly, and prints walks per
second.  "drop-cache" evicts the disk from the page cache.
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
"""If a disk that was not written to has more chunks, only a sample is compared."""
SAMPLED_CHUNKS: Final = 256
SMALL_BYTES: Final = 4096
SMALL_READS: Final = 4096
READERS: Final = 16
WRONG_PREFIX: Final = "wrong data: "
"""The beginning of the line that is printed instead of a number if the content is wrong."""
MARKER: Final = b"qedfuse!"
"""fio fills each write with the offset of the request and this marker, alternating."""


def written(offset: int, length: int) -> bytes:
    """Return the data of a write request of fio's; see `benchmarks.loads`."""
    return (offset.to_bytes(8, "little") + MARKER) * (length // 16)


def compare(found: bytes, expected: bytes, offset: int, block: int) -> int:
    """Return the number of blocks that hold what fio wrote; all others must be as expected.

    Raises:
        ValueError: A block is neither; the message has its offset and content.
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
        at = next(i for i, pair in enumerate(zip(part, wanted, strict=True)) if len({*pair}) > 1)
        msg = (
            f"offset {offset + start + at}: found {part[at : at + 16].hex()}, "
            f"expected {wanted[at : at + 16].hex()}"
        )
        if block:
            msg += f" or {written(offset + start, block)[at : at + 16].hex()}"
        raise ValueError(msg)
    return blocks


def check(disk: str, expected: str, block: int, flags: int = os.O_DIRECT) -> int:
    """Compare a disk; return the number of blocks that hold what fio wrote.

    Raises:
        ValueError: A block has other content.
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
        # Concurrent requests, of the size that the loads use as well: a server that mixes up
        # overlapping requests would answer sequential ones correctly.
        count = 0 if block > SMALL_BYTES else SMALL_READS
        small = [order.randrange(size // SMALL_BYTES) * SMALL_BYTES for _ in range(count)]
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda offset: look(offset, SMALL_BYTES), small):
                pass
            chunks = dict.fromkeys(large)
            return sum(pool.map(lambda offset: look(offset, CHUNK_BYTES), chunks))


def _read(descriptor: int, offset: int, length: int) -> bytes:
    """Read into page-aligned memory, which O_DIRECT requires."""
    with mmap.mmap(-1, length) as buffer:
        count = os.preadv(descriptor, [buffer], offset)
        return buffer[:count]


def walk(disk: str, seconds: float) -> float:
    """Return how many times per second all borders between data and holes are found.

    Raises:
        ValueError: The borders are elsewhere.
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
    """Evict a disk from the page cache of its mount."""
    descriptor = os.open(disk, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return 0


def main() -> None:
    """Run one action and print its number, or one line about wrong data."""
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
