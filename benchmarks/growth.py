"""Measure how far an image grows with a hostile guest and a server that crashes.

    python -m benchmarks.growth                an hour's worth of operations
    python -m benchmarks.growth --quick        five minutes' worth

The guest is assumed to do 20 operations a second (they run as fast as possible).  After
every 5 seconds' worth, SIGKILL ends the process that serves the image, in the middle of its
work.  The same operations go to qedfuse, through its library in a child process, and to
QEMU's own driver, through qemu-io.  After each kill the length of both files, and the space
that they take on the host, are recorded.

There are two guests.  "random" writes and discards random ranges of a small disk, to test
whether the file stays within the bound that follows from the size of the disk.  "moving"
uses a small part of a large disk at any time, and discards what it leaves behind, to test
whether the file stays small.

The output is a table and, with --plot, a chart.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

import trio

from benchmarks.plot import Line, draw
from qedfuse.check.inspector import inspect_image
from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.ondisk.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.disk.disk import Disk

MIB: Final = 1 << 20
CLUSTER_BYTES: Final = 65536
DISK_BYTES: Final = {"random": 256 * MIB, "moving": 64 << 30}
WINDOW_BYTES: Final = 48 * MIB
"""How much of its disk the moving guest uses at any time."""
OPERATIONS_PER_SECOND: Final = 20
KILL_SECONDS: Final = 5
FLUSH_BELOW, WRITE_BELOW = 0.02, 0.6
"""A random number below the first is a flush, below the second a write, otherwise a discard."""
SERVER: Final = (sys.executable, "-m", "benchmarks.growth")
TASKS_IN_FLIGHT: Final = 4
"""The number of operations in flight."""


class Operation(NamedTuple):
    """An operation of the guest; ``start`` and ``length`` are in bytes."""

    kind: Literal["write", "discard", "flush"]
    start: int = 0
    length: int = 0


Guest: TypeAlias = Literal["random", "moving"]


def operations(guest: Guest, seed: int, life: int) -> Iterator[Operation]:
    """Yield the guest's operations after kill number ``life``, without end."""
    choice = random.Random(f"{seed} {life}")
    lengths = (4096, 65536, 299_520, MIB) if guest == "random" else (4096, 65536, 131_072)
    for step in itertools.count():
        chance = choice.random()
        if chance < FLUSH_BELOW:
            yield Operation("flush")
            continue
        kind: Literal["write", "discard"] = "write" if chance < WRITE_BELOW else "discard"
        length = choice.choice(lengths)
        if guest == "random":
            start = choice.randrange((DISK_BYTES[guest] - length) // 512) * 512
            yield Operation(kind, start, length * (2 if kind == "discard" else 1))
            continue
        window = (life * OPERATIONS_PER_SECOND * KILL_SECONDS + step) * 65536
        if kind == "write":
            yield Operation(kind, window + choice.randrange(WINDOW_BYTES // 512) * 512, length)
        else:
            # A longer range than the window has moved, so that no data is left behind.
            yield Operation(kind, max(0, window - 8 * WINDOW_BYTES), 8 * WINDOW_BYTES)


# --- qedfuse, in a child process --------------------------------------------------------


async def _serve(path: str, guest: Guest, seed: int, life: int) -> None:
    """Execute operations, and print a dot for each, until the process is killed."""
    stream = operations(guest, seed, life)
    options = OpenOptions(writable=True, commit_seconds=1.0)
    async with open_disk(path, options, inspector=inspect_image) as disk:

        async def work() -> None:
            for operation in stream:
                await _carry_out(disk, operation)
                os.write(1, b".")

        async with trio.open_nursery() as nursery:
            for _ in range(TASKS_IN_FLIGHT):
                nursery.start_soon(work)


async def _carry_out(disk: Disk, operation: Operation) -> None:
    """Execute an operation."""
    if operation.kind == "write":
        await disk.write(operation.start, b"\xa5" * operation.length)
    elif operation.kind == "discard":
        await disk.discard(operation.start, operation.length)
    else:
        await disk.flush()


def live_with_qedfuse(path: Path, guest: Guest, seed: int, life: int, count: int) -> None:
    """Let a server execute ``count`` operations, and kill it while it executes more."""
    child = subprocess.Popen(
        [*SERVER, "--guest", guest, "--serve", str(path), str(seed), str(life)],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    done = 0
    while done < count:
        part = os.read(child.stdout.fileno(), count - done)
        if not part:
            msg = f"{path}: the server ended by itself"
            raise SystemExit(msg)
        done += len(part)
    child.kill()
    child.wait()
    child.stdout.close()


# --- QEMU --------------------------------------------------------------------------------


def live_with_qemu(path: Path, guest: Guest, seed: int, life: int, count: int) -> None:
    """Let qemu-io execute ``count`` operations, and kill it while it executes more."""
    child = subprocess.Popen(
        # Line-buffered: with a pipe its answers would stay in the buffer.
        ["stdbuf", "-oL", "qemu-io", "-f", "qed", "-d", "unmap", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stream = operations(guest, seed, life)
    for _ in range(2 * count):
        operation = next(stream)
        if operation.kind == "flush":
            child.stdin.write("aio_flush\n")
            continue
        verb = "aio_write -P 165" if operation.kind == "write" else "discard"
        length = min(operation.length, DISK_BYTES[guest] - operation.start)
        child.stdin.write(f"{verb} {operation.start} {length}\n")
    # qemu-io executes the last lines only at the end of its input.
    child.stdin.close()
    done, last = 0, ""
    while done < count:
        line = child.stdout.readline()
        if not line:
            # QEMU 7.2 sometimes fails an assertion, which has the same effect as a kill.
            if "Assertion" in last:
                break
            msg = f"{path}: qemu-io ended by itself: {last}"
            raise SystemExit(msg)
        last = line.strip() or last
        done += "wrote " in line or "discard " in line
    child.kill()
    child.wait()
    child.stdout.close()


# --- the comparison -----------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The length and the space of a file in bytes, after a number of operations."""

    operations: int
    length: int
    space: int


def measure(path: Path, count: int) -> Sample:
    """Return the present length and space of a file."""
    image = path.stat()
    return Sample(count, image.st_size, image.st_blocks * 512)


def compare(
    guest: Guest, total: int, seed: int, directory: Path
) -> tuple[list[Sample], list[Sample]]:
    """Run both systems; return the samples of qedfuse and of QEMU."""
    qedfuse, qemu = directory / "qedfuse.qed", directory / "qemu.qed"
    for path in (qedfuse, qemu):
        trio.run(create_image, str(path), DISK_BYTES[guest])
    step = OPERATIONS_PER_SECOND * KILL_SECONDS
    results: tuple[list[Sample], list[Sample]] = ([measure(qedfuse, 0)], [measure(qemu, 0)])
    for life in range(max(1, total // step)):
        live_with_qedfuse(qedfuse, guest, seed, life, step)
        live_with_qemu(qemu, guest, seed, life, step)
        for samples, path in zip(results, (qedfuse, qemu), strict=True):
            samples.append(measure(path, (life + 1) * step))
        if sys.stderr.isatty():
            print(f"\r{life + 1} kills", end="", file=sys.stderr)
    return results


def main() -> None:
    """Parse the arguments, run, print the table and draw the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=3600 * OPERATIONS_PER_SECOND)
    parser.add_argument("--quick", action="store_true", help="300 seconds' worth of operations")
    parser.add_argument("--guest", choices=("random", "moving"), default="random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write the curves to this SVG file")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        path, seed, life = arguments.serve
        logging.disable(logging.WARNING)  # each kill leaves leaks, which are logged
        trio.run(_serve, path, arguments.guest, int(seed), int(life))
    total = 300 * OPERATIONS_PER_SECOND if arguments.quick else arguments.operations
    guest: Guest = arguments.guest
    bound = Geometry(CLUSTER_BYTES, 4).bound(CLUSTER_BYTES, DISK_BYTES[guest])
    with tempfile.TemporaryDirectory() as directory:
        qedfuse, qemu = compare(guest, total, arguments.seed, Path(directory))
    _print(qedfuse, qemu, bound, f"guest {guest}, seed {arguments.seed}")
    if arguments.plot:
        _draw(arguments.plot, guest, qedfuse, qemu, bound)
    if max(sample.length for sample in qedfuse) > bound:
        sys.exit("qedfuse: the file grew beyond its bound")


def _print(qedfuse: list[Sample], qemu: list[Sample], bound: int, what: str) -> None:
    """Print a table with twelve rows."""
    print(f"{what}; bound {bound / MIB:.1f} MiB; sizes in MiB")
    print("operations    kills   qedfuse length   space     QEMU length   space")
    for index in sorted({len(qedfuse) * part // 12 for part in range(12)} | {len(qedfuse) - 1}):
        one, other = qedfuse[index], qemu[index]
        print(
            f"{one.operations:10}   {index:6}   {one.length / MIB:14.1f}   "
            f"{one.space / MIB:5.1f}   {other.length / MIB:13.1f}   {other.space / MIB:5.1f}"
        )


def _draw(path: Path, guest: Guest, qedfuse: list[Sample], qemu: list[Sample], bound: int) -> None:
    """Draw the chart."""
    last = qedfuse[-1].operations

    def line(name: str, samples: list[Sample], what: str, style: str) -> Line:
        points = [(item.operations, getattr(item, what) / MIB) for item in samples]
        return Line(name, points, style)

    lines = [
        line("QEMU: file length", qemu, "length", "#c0392b"),
        line("qedfuse: file length", qedfuse, "length", "#2471a3"),
        line("qedfuse: space taken", qedfuse, "space", "#7fb3d5"),
    ]
    if guest == "random":
        lines.append(Line("bound", [(0, bound / MIB), (last, bound / MIB)], "#555555"))
    title = f"A {guest} guest on a disk of {DISK_BYTES[guest] // MIB} MiB, {len(qedfuse) - 1} kills"
    draw(path, title, ("operations", "MiB"), lines)


if __name__ == "__main__":
    main()
