"""A soak test: watch the resources of a mounted disk under a long, mixed load.

    python -m benchmarks.soak                    ten minutes
    python -m benchmarks.soak --minutes 60

The command mounts a disk of 16 GiB.  Separate processes read, write, discard and flush at
random, with O_DIRECT; each has a model of the content of its part of the disk, with which it
compares every block that it reads.  They discard as much as they write, so that never more
than some hundred MiB are allocated, at random offsets.  Every five seconds the server's
memory, descriptors and threads are recorded, and the image's length and space.

The output is a table, with the growth of each figure in the second half.  The exit code is 1
if the memory grew by more than 8 MiB from the second minute to the end, if a byte was wrong,
or if the image was not sound in the end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from benchmarks.commands import BenchmarkError, WrongDataError, run
from benchmarks.machine import facts
from benchmarks.mounted import Mounted, program, usage
from benchmarks.reader import MARKER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB: Final = 1 << 20
DISK_BYTES: Final = 16 << 30
BLOCK_BYTES: Final = 4096
SAMPLE_INTERVAL_SECONDS: Final = 5.0
WARM_UP_SECONDS: Final = 120.0
"""Memory used by then is no growth: caches fill up, and malloc keeps memory for reuse."""
MAX_GROWTH_BYTES: Final = 8 * MIB
MAX_WRITTEN_BYTES: Final = 384 * MIB
"""If more than this is allocated, discards replace writes."""
LENGTHS_BYTES: Final = (4096, 4096, 4096, 16384, 65536, 262_144, MIB)
LOAD_PROCESSES: Final = 4
"""The number of processes that use the disk, each its own part."""
LOAD: Final = (sys.executable, "-m", "benchmarks.soak", "--load")
_PUNCH_HOLE: Final = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_libc: Final = ctypes.CDLL(None, use_errno=True)


# --- the load, in a child process --------------------------------------------------------


class Model:
    """The expected content of a part of a disk: for each block the number of its last write.

    A written block is filled with its own number and that of the write; a block that was
    never written, or was discarded, is all zeros.
    """

    def __init__(self, first: int, count: int) -> None:
        """Create the model of ``count`` blocks of zeros from block ``first`` on."""
        self.first: Final = first
        self.count: Final = count
        self._writes = np.zeros(count, np.uint32)
        self._number = 0

    def write(self, block: int, count: int) -> bytes:
        """Record a write of ``count`` blocks; return the data to write."""
        self._number += 1
        index = block - self.first
        self._writes[index : index + count] = self._number
        return self.expected(block, count)

    def discard(self, block: int, count: int) -> None:
        """Record that blocks have become zeros."""
        index = block - self.first
        self._writes[index : index + count] = 0

    def expected(self, block: int, count: int) -> bytes:
        """Return the expected content of blocks."""
        index = block - self.first
        blocks = []
        for at, number in enumerate(self._writes[index : index + count].tolist(), block):
            words = at.to_bytes(4, "little") + number.to_bytes(4, "little") + MARKER
            blocks.append(words * (BLOCK_BYTES // 16) if number else bytes(BLOCK_BYTES))
        return b"".join(blocks)


class Load:
    """Executes random operations on a part of a disk, and compares reads with a model."""

    def __init__(self, disk: str, model: Model, seed: int) -> None:
        """Open the disk; no other process may write to the model's part of it."""
        self._descriptor = os.open(disk, os.O_RDWR | os.O_DIRECT)
        self._model = model
        self._choice = random.Random(seed)
        self._buffer = mmap.mmap(-1, max(LENGTHS_BYTES))
        self._max_written_bytes = MAX_WRITTEN_BYTES // LOAD_PROCESSES
        # Ranges of blocks that were written and not discarded yet.
        self._areas: list[tuple[int, int]] = []
        self._filled = 0
        self.operations = 0

    def run(self, seconds: float) -> None:
        """Execute random operations for some time.

        Raises:
            ValueError: A read returned wrong data.
        """
        kinds: Sequence[Callable[[], None]] = (self.read, self.write, self.discard, self.flush)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._choice.choices(kinds, (60, 25, 14, 1))[0]()
            self.operations += 1

    def _range(self) -> tuple[int, int]:
        """Return a random range of the part, in blocks; most begin where data was written."""
        model, choice = self._model, self._choice
        count = choice.choice(LENGTHS_BYTES) // BLOCK_BYTES
        if self._areas and choice.random() < 0.7:  # noqa: PLR2004
            block, _count = choice.choice(self._areas)
        else:
            block = model.first + choice.randrange(model.count)
        return block, min(count, model.first + model.count - block)

    def read(self) -> None:
        """Read a random range, and compare it with the model.

        Raises:
            ValueError: The range has wrong content.
        """
        block, count = self._range()
        self._compare(block, count)

    def _compare(self, block: int, count: int) -> None:
        length = count * BLOCK_BYTES
        got = os.preadv(self._descriptor, [memoryview(self._buffer)[:length]], block * BLOCK_BYTES)
        found, expected = self._buffer[:got], self._model.expected(block, count)
        if found != expected:
            pairs = zip(found, expected, strict=False)
            index = next((at for at, (one, two) in enumerate(pairs) if one != two), got)
            msg = (
                f"offset {block * BLOCK_BYTES + index}: found {found[index : index + 16].hex()}, "
                f"expected {expected[index : index + 16].hex()}"
            )
            raise ValueError(msg)

    def write(self) -> None:
        """Write a random range; if too much is allocated, discard instead."""
        if self._filled * BLOCK_BYTES > self._max_written_bytes:
            self.discard()
            return
        block, count = self._range()
        self._buffer[: count * BLOCK_BYTES] = self._model.write(block, count)
        os.pwritev(
            self._descriptor, [memoryview(self._buffer)[: count * BLOCK_BYTES]], block * BLOCK_BYTES
        )
        self._areas.append((block, count))
        self._filled += count

    def discard(self) -> None:
        """Discard all clusters that one of the writes has touched."""
        if not self._areas:
            return
        index = self._choice.randrange(len(self._areas))
        self._areas[index], self._areas[-1] = self._areas[-1], self._areas[index]
        block, count = self._areas.pop()
        self._filled -= count
        cluster = 65536 // BLOCK_BYTES
        first = max(self._model.first, block // cluster * cluster)
        last = min(self._model.first + self._model.count, -(-(block + count) // cluster) * cluster)
        start, length = (
            ctypes.c_int64(first * BLOCK_BYTES),
            ctypes.c_int64((last - first) * BLOCK_BYTES),
        )
        if _libc.fallocate(self._descriptor, _PUNCH_HOLE, start, length) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "fallocate")
        self._model.discard(first, last - first)

    def flush(self) -> None:
        """Flush the disk."""
        os.fsync(self._descriptor)

    def compare_all(self) -> None:
        """Read all ranges that were written and not discarded, and compare them.

        Raises:
            ValueError: A range has wrong content.
        """
        for block, count in sorted(set(self._areas)):
            self._compare(block, count)


def put_load_on(disk: str, seconds: float, part: int, seed: int) -> None:
    """Use one part of the disk, in a child process; print the number of operations."""
    count = DISK_BYTES // BLOCK_BYTES // LOAD_PROCESSES
    load = Load(disk, Model(part * count, count), seed + part)
    try:
        load.run(seconds)
        load.compare_all()
    except ValueError as error:
        sys.exit(f"wrong data: {disk}: {error}")
    except OSError as error:
        sys.exit(f"{disk}: {error}")
    print(load.operations)


# --- the observer -------------------------------------------------------------------------


class Sample(NamedTuple):
    """The resources of server and image at a time; sizes in bytes."""

    seconds: float
    resident: int
    descriptors: int
    threads: int
    length: int
    space: int


def sample(began: float, pid: int, image: Path) -> Sample:
    """Return the present resources of server and image."""
    used, file = usage(pid), image.stat()
    passed = time.monotonic() - began
    return Sample(
        passed, used.resident, used.descriptors, used.threads, file.st_size, file.st_blocks * 512
    )


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the growth of each figure per minute in the second half, by least squares."""
    half = [item for item in samples if item.seconds >= samples[-1].seconds / 2]
    minutes = [item.seconds / 60 for item in half]
    return {
        name: float(np.polyfit(minutes, [getattr(item, name) for item in half], 1)[0])
        for name in Sample._fields[1:]
    }


def growth(samples: Sequence[Sample]) -> int:
    """Return the growth of the memory in bytes, after a warm-up.

    In a run that is too short for the warm-up, growth is counted from the middle on.
    """
    settled = min(WARM_UP_SECONDS, samples[-1].seconds / 2)
    before = next(item for item in samples if item.seconds >= settled)
    return samples[-1].resident - before.resident


def watch(mounted: Mounted, image: Path, seconds: float, seed: int) -> tuple[list[Sample], int]:
    """Run the load; return the samples and the number of operations.

    Raises:
        BenchmarkError: The server ended.
        WrongDataError: The load read wrong data.
    """
    children = [
        subprocess.Popen(
            [*LOAD, str(mounted.disk), str(seconds), str(part), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(LOAD_PROCESSES)
    ]
    samples: list[Sample] = []
    began = time.monotonic()
    try:
        while any(child.poll() is None for child in children):
            samples.append(sample(began, mounted.pid, image))
            if sys.stderr.isatty():
                print(f"\r{samples[-1].seconds:.0f} s", end="", file=sys.stderr)
            if samples[-1].seconds > 2 * seconds + 60:
                msg = f"the load found no end after {samples[-1].seconds:.0f} s"
                raise BenchmarkError(msg)
            time.sleep(SAMPLE_INTERVAL_SECONDS)
    finally:
        for child in children:
            child.kill()
    operations = 0
    for child in children:
        output, errors = child.communicate(timeout=60)
        if child.returncode:
            raise WrongDataError(errors.strip() or f"the load ended with {child.returncode}")
        operations += int(output)
    return samples, operations


def table(samples: Sequence[Sample]) -> str:
    """Return a table with twenty rows, and the growth of each figure."""
    lines = [
        "| minutes | memory, MiB | descriptors | threads | file length, MiB | space, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    indices = sorted({len(samples) * part // 20 for part in range(20)} | {len(samples) - 1})
    lines += [
        f"| {item.seconds / 60:.1f} | {item.resident / MIB:.1f} | {item.descriptors} | "
        f"{item.threads} | {item.length / MIB:.0f} | {item.space / MIB:.0f} |"
        for item in (samples[index] for index in indices)
    ]
    by = slopes(samples)
    lines.append(
        f"| growth per minute, second half | {by['resident'] / MIB:.3f} | "
        f"{by['descriptors']:.2f} | {by['threads']:.2f} | {by['length'] / MIB:.2f} | "
        f"{by['space'] / MIB:.2f} |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the arguments, run the test, and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where 2 GiB are free (the temporary directory)")
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        disk, seconds, part, seed = arguments.load
        put_load_on(disk, float(seconds), int(part), int(seed))
        return
    try:
        with tempfile.TemporaryDirectory(prefix="qedfuse-soak-", dir=arguments.dir) as name:
            grown = soak(Path(name), arguments.minutes * 60, arguments.seed)
    except (BenchmarkError, OSError) as error:
        sys.exit(f"soak: {error}")
    if grown > MAX_GROWTH_BYTES:
        sys.exit(f"soak: memory grew by {grown / MIB:.1f} MiB, expected at most 8")


def soak(directory: Path, seconds: float, seed: int) -> int:
    """Run the test and print the results; return the growth of the memory in bytes.

    Raises:
        BenchmarkError: A program failed, or the image is not sound.
    """
    image = directory / "soak.qed"
    run("qemu-img", "create", "-q", "-f", "qed", str(image), str(DISK_BYTES))
    about = facts(directory, program(), f"{seconds / 60:g} minutes, seed {seed}")
    with Mounted(program(), image, directory / "mnt") as mounted:
        samples, operations = watch(mounted, image, seconds, seed)
        mounted.stop()
    grown = growth(samples)
    print("".join(f"- {name}: {fact}\n" for name, fact in about.items()))
    print(table(samples))
    print(f"{operations:,} operations; memory grew by {grown / MIB:.2f} MiB after it settled")
    print(check(image))
    return grown


def check(image: Path) -> str:
    """Check an image with qemu-img; return its findings in one line.

    Raises:
        BenchmarkError: The image has errors.
    """
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", str(image)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    # QEMU has no concept of free space: discarded clusters that are not reused count as leaked.
    if done.returncode not in {0, 3}:
        msg = f"{image.name}: qemu-img check: exit code {done.returncode}: {done.stderr.strip()}"
        raise BenchmarkError(msg)
    found = json.loads(done.stdout)
    return (
        f"qemu-img check: {found['check-errors']} errors, {found.get('corruptions', 0)} "
        f"corruptions, {found.get('leaks', 0)} free clusters"
    )


if __name__ == "__main__":
    main()
