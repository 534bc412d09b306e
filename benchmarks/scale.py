"""Measure how the cost of a disk depends on its size and on the number of its clusters.

    python -m benchmarks.scale                1 GiB to 64 TiB, 10^4 to 10^7 clusters
    python -m benchmarks.scale --quick        a few of these disks, once each

Each image has real tables, and data clusters that are holes of the host's file, see
`benchmarks.sparse`; it is in the host's page cache.  Each round uses a new copy: the command
mounts it, and it is read from, written to and unmounted.  It is also opened by the library,
in a separate process, to measure the time until its free space is known.  The result is the
median of the rounds.

Reads have 4 KiB, use O_DIRECT, follow one after the other, and are verified.  "near" reads
within 16 GiB of disk, whose tables are all in memory; "anywhere" reads in the whole disk,
whose tables are in memory as far as the cache allows.

The output is a table, and a list of the columns that are flat.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import trio

from benchmarks.commands import BenchmarkError, WrongDataError, run
from benchmarks.machine import facts
from benchmarks.mounted import Mounted, program, usage, wait_until_idle
from benchmarks.pagecache import sync_file
from benchmarks.probe import BLOCK_BYTES, stamp
from benchmarks.reader import WRONG_PREFIX
from benchmarks.report import number
from benchmarks.sparse import GEOMETRY, build
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

SIZES: Final = ("1G", "64G", "1T", "16T", "64T")
CLUSTERS: Final = (10**4, 10**5, 10**6, 10**7)
QUICK: Final = (("1G", 10**4), ("64T", 10**4), ("64T", 10**6))
ROUNDS, SECONDS = 3, 1.0
QUICK_SECONDS: Final = 0.4
SAMPLE_BLOCKS: Final = 4096
"""The number of different blocks that are read, in different clusters if there are enough."""
WRITE_COUNT: Final = 1000
NEAR_BYTES: Final = 16 << 30
FLAT_FACTOR: Final = 2.0
"""A column is flat if the ratio of its largest to its smallest figure is at most this."""
MIB: Final = 1 << 20
ROOT: Final = Path(__file__).resolve().parents[1]

COLUMNS: Final[Mapping[str, str]] = {
    "start": "start, s",
    "first": "first read, ms",
    "near": "reads/s near",
    "anywhere": "reads/s anywhere",
    "resident": "idle MiB",
    "loaded": "MiB after load",
    "peak": "peak MiB",
    "write": f"{WRITE_COUNT} writes, s",
    "flush": "flush, s",
    "unmount": "unmount, s",
    "open": "library open, s",
    "scan": "scan, s",
    "cpu": "scan, CPU s",
}


class Cell(NamedTuple):
    """A disk: its size, such as 64G, and the number of its allocated clusters."""

    size: str
    clusters: int

    @property
    def fits(self) -> bool:
        """Whether the disk has at least this number of clusters."""
        return self.clusters <= GEOMETRY.clusters(parse_size(self.size))


class Original:
    """An image that is copied for each round, and the offsets that the loads use.

    Attributes:
        path: The image.
        tables: The number of its L2 tables.
    """

    def __init__(self, cell: Cell, directory: Path) -> None:
        """Create the image of a cell."""
        self.path: Final = directory / "original.qed"
        self._directory = directory
        size = parse_size(cell.size)
        random = np.random.default_rng(2)
        clusters, offsets = build(self.path, size, cell.clusters)
        self.tables: Final = len(np.unique(clusters // GEOMETRY.entries))
        everywhere = random.integers(0, len(clusters), SAMPLE_BLOCKS)
        start = int(random.integers(0, len(clusters)))
        end = int(np.searchsorted(clusters, clusters[start] + NEAR_BYTES // GEOMETRY.cluster_size))
        near = random.integers(start, end, SAMPLE_BLOCKS)
        blocks = (
            random.integers(0, GEOMETRY.cluster_size // BLOCK_BYTES, SAMPLE_BLOCKS) * BLOCK_BYTES
        )
        with self.path.open("r+b", buffering=0) as file:
            for name, chosen in (("anywhere", everywhere), ("near", near)):
                guest_offsets = clusters[chosen] * GEOMETRY.cluster_size + blocks
                file_offsets = offsets[chosen] + blocks
                for guest_offset, file_offset in zip(
                    guest_offsets.tolist(), file_offsets.tolist(), strict=True
                ):
                    os.pwrite(file.fileno(), stamp(guest_offset), file_offset)
                self._note(name, guest_offsets)
        self._note("first", self.offsets("anywhere")[-1:])
        self._note("write", random.integers(0, size // BLOCK_BYTES, WRITE_COUNT) * BLOCK_BYTES)

    def _note(self, name: str, offsets: NDArray[np.int64]) -> None:
        self.list(name).write_bytes(offsets.astype("<u8").tobytes())

    def list(self, name: str) -> Path:
        """Return the file with the guest offsets of a load."""
        return self._directory / f"{name}.offsets"

    def offsets(self, name: str) -> NDArray[np.int64]:
        """Return the guest offsets of a load."""
        return np.fromfile(self.list(name), "<u8").astype(np.int64)

    def copy(self) -> Path:
        """Create a copy that may be changed; it is in the page cache and on the host's disk."""
        path = self._directory / "copy.qed"
        path.unlink(missing_ok=True)
        run("cp", "--sparse=always", str(self.path), str(path), seconds=300)
        sync_file(path)
        return path


def probe(word: str, disk: Path, original: Original, *more: str, load: str = "") -> list[float]:
    """Run `benchmarks.probe` on a disk, and return its figures.

    Raises:
        BenchmarkError: The probe failed, or found wrong data.
    """
    command = (sys.executable, "-m", "benchmarks.probe", word, str(disk))
    output = run(*command, str(original.list(load or word)), *more, seconds=300)
    if output.startswith(WRONG_PREFIX):
        raise WrongDataError(output.strip())
    return [float(figure) for figure in output.split()]


def measure(original: Original, seconds: float, directory: Path) -> dict[str, float]:
    """Measure one round; return the figures of `COLUMNS`.

    Raises:
        BenchmarkError: A measurement failed.
    """
    figures: dict[str, float] = {}
    image = original.copy()
    command = (sys.executable, "-m", "benchmarks.scale", "--scan", str(image))
    figures.update(json.loads(run(*command, seconds=300)))
    with Mounted(program(), image, directory / "mnt") as mounted:
        figures["start"] = mounted.start_seconds
        figures["first"] = probe("first", mounted.disk, original)[0] * 1000
        # The scan in the background must not slow down the loads.
        wait_until_idle(mounted.pid)
        figures["resident"] = usage(mounted.pid).resident / MIB
        for load in ("near", "anywhere"):
            figures[load] = probe("read", mounted.disk, original, str(seconds), load=load)[0]
        figures["write"], figures["flush"] = probe("write", mounted.disk, original)
        wait_until_idle(mounted.pid)
        used = usage(mounted.pid)
        figures["loaded"], figures["peak"] = used.resident / MIB, used.peak / MIB
        figures["unmount"] = mounted.stop()
    return figures


async def _scan(path: str) -> dict[str, float]:
    """Open an image for writing; return the seconds until it is open, and until it is scanned."""
    began, busy = time.monotonic(), time.process_time()
    async with open_disk(path, OpenOptions(writable=True)) as disk:
        opened = time.monotonic() - began
        await disk.ensure_scanned()
        scanned, worked = time.monotonic() - began, time.process_time() - busy
    return {"open": opened, "scan": scanned, "cpu": worked}


def flatness(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the ratio of the largest to the smallest figure of each column."""
    rows = list(rows)
    found = {}
    for column in COLUMNS:
        figures = [row[column] for row in rows]
        found[column] = max(figures) / max(min(figures), 1e-9)
    return found


def markdown(results: Mapping[Cell, Mapping[str, float]], tables: Mapping[Cell, int]) -> str:
    """Return the table, and below it the lists of flat columns and of the others."""
    head = ["disk", "clusters", "L2 tables", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cell, row in results.items():
        power = f"10^{len(str(cell.clusters)) - 1}"
        figures = [number(row[column]) for column in COLUMNS]
        lines.append(f"| {' | '.join([cell.size, power, f'{tables[cell]:,}', *figures])} |")
    spreads = flatness(results.values())
    flat = [COLUMNS[column] for column, factor in spreads.items() if factor <= FLAT_FACTOR]
    others = [f"{COLUMNS[name]} ({number(by)})" for name, by in spreads.items() if by > FLAT_FACTOR]
    lines += ["", f"Flat, within a factor of {FLAT_FACTOR:g}: {'; '.join(flat) or 'none'}."]
    lines.append(f"Not flat, and by what factor: {'; '.join(others) or 'none'}.")
    return "\n".join(lines) + "\n"


def compare(
    cells: Sequence[Cell], rounds: int, seconds: float, directory: Path
) -> tuple[dict[Cell, dict[str, float]], dict[Cell, int]]:
    """Measure each cell; return the medians, and the number of L2 tables of each image."""
    results, tables = {}, {}
    for cell in cells:
        began = time.monotonic()
        original = Original(cell, directory)
        found = [measure(original, seconds, directory) for _ in range(rounds)]
        results[cell] = {name: median(row[name] for row in found) for name in COLUMNS}
        tables[cell] = original.tables
        words = "  ".join(f"{name} {number(value)}" for name, value in results[cell].items())
        passed = time.monotonic() - began
        print(f"{cell.size} {cell.clusters:,}: {words}  ({passed:.0f} s)", file=sys.stderr)
    return results, tables


def main() -> None:
    """Parse the arguments, measure, and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few disks, one round")
    parser.add_argument("--rounds", type=int, help=f"of each disk ({ROUNDS})")
    parser.add_argument("--seconds", type=float, help=f"of each load ({SECONDS:g})")
    parser.add_argument("--sizes", help=f"of disks ({','.join(SIZES)})")
    parser.add_argument("--clusters", help="that are allocated (10000,100000,1000000,10000000)")
    parser.add_argument("--dir", type=Path, default=ROOT, help="where 2 GiB are free")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians here too")
    parser.add_argument("--scan", metavar="IMAGE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scan:
        print(json.dumps(trio.run(_scan, arguments.scan)))
        return
    # An installed program has compiled byte code; here the first round must be able to store it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    cells = [Cell(*pair) for pair in QUICK]
    if not arguments.quick or arguments.sizes or arguments.clusters:
        sizes = arguments.sizes.split(",") if arguments.sizes else SIZES
        counts = map(int, arguments.clusters.split(",")) if arguments.clusters else CLUSTERS
        every = [Cell(size, count) for count in counts for size in sizes]
        cells = sorted((cell for cell in every if cell.fits), key=lambda cell: sizes.index(cell[0]))
    rounds = arguments.rounds or (1 if arguments.quick else ROUNDS)
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="qedfuse-scale-", dir=arguments.dir) as name:
            about = facts(Path(name), program(), f"{rounds} rounds of {seconds:g} s")
            results, tables = compare(cells, rounds, seconds, Path(name))
    except (BenchmarkError, OSError, ValueError) as error:
        sys.exit(f"scale: {error}")
    about["settings"] += f"; took {(time.monotonic() - began) / 60:.1f} minutes"
    print("".join(f"- {name}: {fact}\n" for name, fact in about.items()))
    print(markdown(results, tables), end="")
    if arguments.json:
        arguments.json.write_text(_as_json(results, tables, about), encoding="utf-8")


def _as_json(
    results: Mapping[Cell, Mapping[str, float]],
    tables: Mapping[Cell, int],
    about: Mapping[str, str],
) -> str:
    """Return everything as JSON."""
    rows: list[dict[str, Any]] = [
        {**cell._asdict(), "tables": tables[cell], **row} for cell, row in results.items()
    ]
    spreads = flatness(results.values())
    return json.dumps({"facts": dict(about), "rows": rows, "spreads": spreads}, indent=1) + "\n"


if __name__ == "__main__":
    main()
