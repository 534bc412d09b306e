"""How far an image grows under a hostile guest that also makes its server crash.

    python -m benchmarks.growth                an hour's worth of operations
    python -m benchmarks.growth --quick        five minutes' worth

The guest writes and discards random ranges, 20 operations a second (they run as fast as
they can), and every 5 seconds' worth the process that serves the image is killed with
SIGKILL in the middle of its work.  The same operations go to qedfuse, by way of its
library in a child process, and to QEMU's own driver, by way of qemu-io.  After each kill
the length of both files and the space they take up are noted.

Prints a table; draws both curves, and the bound that the size of the disk allows.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import trio

from benchmarks.plot import Line, draw
from qedfuse.check.inspector import inspect_image
from qedfuse.disk.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.ondisk.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.disk.disk import Disk

MIB: Final = 1 << 20
CLUSTER: Final = 65536
DISK_BYTES: Final = 256 * MIB
PER_SECOND: Final = 20
KILL_SECONDS: Final = 5
AT_ONCE: Final = 4
"""Operations that are under way at the same time."""


class Operation(NamedTuple):
    """What the guest does: ``start`` and ``length`` in bytes."""

    kind: Literal["write", "discard", "flush"]
    start: int = 0
    length: int = 0


def operations(seed: int, life: int) -> Iterator[Operation]:
    """Give what the guest does between two kills, without end."""
    choice = random.Random(f"{seed} {life}")
    while True:
        chance = choice.random()
        if chance < 0.02:  # noqa: PLR2004
            yield Operation("flush")
            continue
        kind: Literal["write", "discard"] = "write" if chance < 0.6 else "discard"  # noqa: PLR2004
        length = choice.choice((4096, 65536, 300_000, MIB)) // 512 * 512
        start = choice.randrange((DISK_BYTES - length) // 512) * 512
        yield Operation(kind, start, length * (2 if kind == "discard" else 1))


# --- qedfuse, in a process of its own ---------------------------------------------------


async def _serve(path: str, seed: int, life: int) -> None:
    """Carry operations out and print a dot for each, until somebody kills us."""
    stream = operations(seed, life)
    options = OpenOptions(writable=True, commit_seconds=1.0)
    async with open_disk(path, options, inspector=inspect_image) as disk:

        async def work() -> None:
            for operation in stream:
                await _carry_out(disk, operation)
                os.write(1, b".")

        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(work)


async def _carry_out(disk: Disk, operation: Operation) -> None:
    """Do one thing."""
    if operation.kind == "write":
        await disk.write(operation.start, b"\xa5" * operation.length)
    elif operation.kind == "discard":
        await disk.discard(operation.start, operation.length)
    else:
        await disk.flush()


def live_with_qedfuse(path: Path, seed: int, life: int, count: int) -> None:
    """Have a server do ``count`` operations, and kill it while it does more."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.growth", "--serve", str(path), str(seed), str(life)],
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


def live_with_qemu(path: Path, seed: int, life: int, count: int) -> None:
    """Do the same with qemu-io."""
    child = subprocess.Popen(
        # Line by line: with a pipe it would keep its answers to itself.
        ["stdbuf", "-oL", "qemu-io", "-f", "qed", "-d", "unmap", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    stream = operations(seed, life)
    for _ in range(2 * count):
        operation = next(stream)
        if operation.kind == "flush":
            child.stdin.write("aio_flush\n")
            continue
        verb = "aio_write -P 165" if operation.kind == "write" else "discard"
        length = min(operation.length, DISK_BYTES - operation.start)
        child.stdin.write(f"{verb} {operation.start} {length}\n")
    # It takes the lines one by one, but the last ones only when there is an end.
    child.stdin.close()
    done, last = 0, ""
    while done < count:
        line = child.stdout.readline()
        if not line:
            # Version 7.2 fails an assertion of its own now and then, which is as good as
            # a kill.
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
    """What a file had come to after so many operations, in bytes."""

    operations: int
    length: int
    space: int


def measure(path: Path, count: int) -> Sample:
    """Look at a file."""
    image = path.stat()
    return Sample(count, image.st_size, image.st_blocks * 512)


def compare(total: int, seed: int, directory: Path) -> tuple[list[Sample], list[Sample]]:
    """Run both; give the samples of qedfuse and of QEMU."""
    ours, theirs = directory / "qedfuse.qed", directory / "qemu.qed"
    for path in (ours, theirs):
        trio.run(create_image, str(path), DISK_BYTES)
    step = PER_SECOND * KILL_SECONDS
    results: tuple[list[Sample], list[Sample]] = ([measure(ours, 0)], [measure(theirs, 0)])
    for life in range(max(1, total // step)):
        live_with_qedfuse(ours, seed, life, step)
        live_with_qemu(theirs, seed, life, step)
        for samples, path in zip(results, (ours, theirs), strict=True):
            samples.append(measure(path, (life + 1) * step))
        if sys.stderr.isatty():
            print(f"\r{life + 1} kills", end="", file=sys.stderr)
    return results


def main() -> None:
    """Read the arguments, run, print and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=3600 * PER_SECOND)
    parser.add_argument("--quick", action="store_true", help="300 seconds' worth of operations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write the curves to this SVG file")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        path, seed, life = arguments.serve
        logging.disable(logging.WARNING)  # leaks after a kill are what this is about
        trio.run(_serve, path, int(seed), int(life))
    total = 300 * PER_SECOND if arguments.quick else arguments.operations
    header_end = CLUSTER
    bound = Geometry(CLUSTER, 4).bound(header_end, DISK_BYTES)
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = compare(total, arguments.seed, Path(directory))
    _print(ours, theirs, bound, arguments.seed)
    if arguments.plot:
        _draw(arguments.plot, ours, theirs, bound)
    if max(sample.length for sample in ours) > bound:
        sys.exit("qedfuse: the file grew beyond its bound")


def _print(ours: list[Sample], theirs: list[Sample], bound: int, seed: int) -> None:
    """Print a row for each twelfth of the time."""
    print(
        f"seed {seed}; disk {DISK_BYTES / MIB:.0f} MiB; bound {bound / MIB:.1f} MiB; sizes in MiB"
    )
    print("operations    kills   qedfuse length   space     QEMU length   space")
    for place in sorted({len(ours) * part // 12 for part in range(12)} | {len(ours) - 1}):
        mine, other = ours[place], theirs[place]
        print(
            f"{mine.operations:10}   {place:6}   {mine.length / MIB:14.1f}   "
            f"{mine.space / MIB:5.1f}   {other.length / MIB:13.1f}   {other.space / MIB:5.1f}"
        )


def _draw(path: Path, ours: list[Sample], theirs: list[Sample], bound: int) -> None:
    """Draw the curves."""
    last = ours[-1].operations

    def line(name: str, samples: list[Sample], what: str, style: str) -> Line:
        points = [(item.operations, getattr(item, what) / MIB) for item in samples]
        return Line(name, points, style)

    draw(
        path,
        f"An image of {DISK_BYTES // MIB} MiB, killed every {PER_SECOND * KILL_SECONDS} operations",
        ("operations", "MiB"),
        [
            line("QEMU: file length", theirs, "length", "#c0392b"),
            line("qedfuse: file length", ours, "length", "#2471a3"),
            line("qedfuse: space taken", ours, "space", "#7fb3d5"),
            Line("bound", [(0, bound / MIB), (last, bound / MIB)], "#555555"),
        ],
    )


if __name__ == "__main__":
    main()
