"""Measure what counting the requests costs: each 4 KiB cell with and without, by turns.

    python -m benchmarks.counting [--dir DIRECTORY] [--rounds N] [--seconds S] [--without PROGRAM]

Both programs mount the same image, one after the other, in alternating order.  With two copies of
an image the host might be writing back pages of only one, and that one would be slower.  "without"
is the same program whose extension counts no requests, or PROGRAM, the command qedfuse of another
installation, such as an earlier version.  The figures are medians over the rounds: requests per
second, and the processor time of the server for each request.  A ratio is the median of the ratios
of all rounds, so slow changes of the machine have no effect on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.commands import run
from benchmarks.cputime import cpu_time
from benchmarks.machine import facts
from benchmarks.mounted import Mounted, program
from benchmarks.rounds import rotated_orders

MIB: Final = 1 << 20
DISK_MIB: Final = 256

WITHOUT: Final = """\
#!{python}
import sys
from qedfuse.mount.fuse import exporteddisk
from qedfuse.mount.fuse.requestcounters import SharedCells
exporteddisk.ExportedDisks.shared_cells = lambda self: SharedCells(0, ())
from qedfuse.cli.entrypoints import qedfuse_program
sys.exit(qedfuse_program())
"""
"""A program whose extension counts no requests."""


class Cell(NamedTuple):
    """A kind of request, how many are in flight, and the arguments of fio."""

    name: str
    mode: str
    depth: int
    more: tuple[str, ...] = ()


CELLS: Final = (
    Cell("read, 1 in flight", "randread", 1),
    Cell("read, 16 in flight", "randread", 16),
    Cell("write, 1 in flight", "randwrite", 1),
    Cell("write, 16 in flight", "randwrite", 16),
    Cell("write and flush", "randwrite", 1, ("--fdatasync=1",)),
)


class Rate(NamedTuple):
    """The figures of one measurement.

    Attributes:
        requests: Requests per second.
        microseconds: The processor time of the server for each request.
    """

    requests: float
    microseconds: float


def measure(cell: Cell, mount: Mounted, seconds: float) -> Rate:
    """Return the rate of a cell on a mounted disk."""
    before = cpu_time(mount.pid)
    done = run(
        *("fio", f"--name={cell.mode}", f"--filename={mount.disk}", f"--rw={cell.mode}", "--bs=4k"),
        *("--direct=1", "--ioengine=libaio", f"--iodepth={cell.depth}", f"--size={DISK_MIB}m"),
        *("--time_based", f"--runtime={seconds}s", "--randseed=1", "--output-format=json"),
        *cell.more,
        seconds=seconds + 60,
    )
    used = cpu_time(mount.pid).minus(before).total
    (job,) = json.loads(done)["jobs"]
    side = job["read" if cell.mode == "randread" else "write"]
    return Rate(float(side["iops"]), used * 1e6 / side["total_ios"])


def compare(directory: Path, programs: dict[str, str], rounds: int, seconds: float) -> None:
    """Measure all cells with both programs by turns, and print a line for each cell."""
    image = directory / "counting.qed"
    run(str(Path(program()).with_name("qedimg")), "create", "-q", str(image), f"{DISK_MIB}M")
    with Mounted(programs["with"], image, directory / "mnt") as mount:
        with mount.disk.open("r+b") as disk:
            for _ in range(DISK_MIB):
                disk.write(bytes(range(256)) * (MIB // 256))
        mount.stop()
    print(f"{'4 KiB O_DIRECT':22}{'requests/s':>26}{'CPU, µs/request':>26}")
    columns = f"{'with':>9}{'without':>9}{'ratio':>8}"
    print(f"{'':22}{columns}{columns}")
    for cell in CELLS:
        found: dict[str, list[Rate]] = {name: [] for name in programs}
        for order in rotated_orders(list(programs), rounds):
            for name in order:
                with Mounted(programs[name], image, directory / "mnt") as mount:
                    found[name].append(measure(cell, mount, seconds))
                    mount.stop()
        print(f"{cell.name:22}{_columns(found, 0, 0)}{_columns(found, 1, 1)}", flush=True)


def _columns(found: dict[str, list[Rate]], field: int, digits: int) -> str:
    """Return the columns of a field: the medians with and without, and the ratio."""
    counted, other = ([rate[field] for rate in found[name]] for name in ("with", "without"))
    ratio = statistics.median(a / b for a, b in zip(counted, other, strict=True))
    middle = [statistics.median(values) for values in (counted, other)]
    return "".join(f"{value:9.{digits}f}" for value in middle) + f"{ratio:8.3f}"


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Measure what counting the requests costs.")
    parser.add_argument("--dir", type=Path, help="where the image lies (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=1.5, help="time of each measurement")
    parser.add_argument("--without", metavar="PROGRAM", help="a qedfuse that does not count")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        directory = Path(name)
        without = directory / "without.py"
        without.write_text(WITHOUT.format(python=sys.executable), encoding="utf-8")
        without.chmod(0o755)
        programs = {"with": program(), "without": arguments.without or str(without)}
        settings = f"{arguments.rounds} rounds of {arguments.seconds} s"
        for fact, value in facts(directory, programs["with"], settings).items():
            print(f"{fact}: {value}")
        compare(directory, programs, arguments.rounds, arguments.seconds)


if __name__ == "__main__":
    main()
