"""Measure what counting the requests costs: each 4 KiB cell with and without, in one server.

    python -m benchmarks.counting [--dir DIRECTORY] [--pairs N] [--seconds S]

Two processes of the same program differ by several per cent, because their memory lies elsewhere.
Therefore one process serves the disk all the time while fio loads it, and a signal makes its
extension count or not, for a fraction of a second each.  A pair is one such time with and one
without; which of them is the first alternates.  A ratio is the median of the ratios of all pairs,
so slow changes of the machine have no effect on it; the range beside it contains the true median
with a probability of 95 %.  Must be run as root, because only root may read how many bytes another
process has passed to system calls.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from benchmarks.commands import BenchmarkError, run
from benchmarks.machine import facts
from benchmarks.mounted import Mounted, program

MIB: Final = 1 << 20
DISK_MIB: Final = 256
WARM_UP_SECONDS: Final = 1.0
COUNT: Final = signal.SIGRTMIN
DO_NOT_COUNT: Final = signal.SIGRTMIN + 1

SWITCHABLE: Final = """\
#!{python}
import signal
import sys
from qedfuse.mount.fuse import extraops
serve = extraops.serve
def serve_switchable(handler, data_requests, counters):
    failure = serve(handler, data_requests, counters)
    set_counters = extraops._extension.set_counters
    signal.signal({count}, lambda *_: set_counters(*counters))
    signal.signal({do_not_count}, lambda *_: set_counters(0, ()))
    return failure
extraops.serve = serve_switchable
from qedfuse.cli.entrypoints import qedfuse_program
sys.exit(qedfuse_program())
"""
"""A program whose extension starts and stops counting when it gets a signal."""


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


class Usage(NamedTuple):
    """What a server has used since its start, or between two moments.

    Attributes:
        at: The moment in seconds of the monotonic clock, or the seconds between the moments.
        cpu_ns: The processor time of its threads in nanoseconds (proc_pid_schedstat(5)).
        transferred: The bytes of its system calls that read and write (proc_pid_io(5)).  Each
            request of a cell transfers equally many.
    """

    at: float
    cpu_ns: int
    transferred: int

    def since(self, earlier: Usage) -> Usage:
        """Return the difference to an earlier usage."""
        return Usage(
            self.at - earlier.at,
            self.cpu_ns - earlier.cpu_ns,
            self.transferred - earlier.transferred,
        )

    @property
    def throughput(self) -> float:
        """Bytes per second, in a difference."""
        return self.transferred / self.at

    @property
    def ns_per_byte(self) -> float:
        """Processor time for each byte, in a difference."""
        return self.cpu_ns / self.transferred


def usage(pid: int) -> Usage:
    """Return what a process has used since its start.

    Raises:
        BenchmarkError: The process has ended, or this process may not look.
    """
    process = Path(f"/proc/{pid}")
    try:
        threads = [(task / "schedstat").read_text("ascii") for task in (process / "task").iterdir()]
        fields = dict(line.split(": ") for line in (process / "io").read_text("ascii").splitlines())
    except OSError as error:
        msg = f"process {pid}: the server has ended, or this user may not look at it: {error}"
        raise BenchmarkError(msg) from None
    return Usage(
        time.monotonic(),
        sum(int(thread.split()[0]) for thread in threads),
        int(fields["rchar"]) + int(fields["wchar"]),
    )


class Interval(NamedTuple):
    """The median of some ratios, and the range that contains the true one (95 %)."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        """Return the median with the range in brackets."""
        return f"{self.middle:.4f} ({self.low:.4f} to {self.high:.4f})"


def median_interval(ratios: list[float]) -> Interval:
    """Return the median of at least six ratios and its 95 % interval.

    How many of n ratios are below the true median has the binomial distribution with p = 1/2, so
    the true median is between the ratios whose ranks are 0.98 √n below and above n/2.
    """
    ordered = sorted(ratios)
    half = 0.98 * math.sqrt(len(ordered))
    low = math.floor(len(ordered) / 2 - half)
    high = math.ceil(len(ordered) / 2 + half)
    return Interval(ordered[max(low, 0)], median(ordered), ordered[min(high, len(ordered)) - 1])


class Costs(NamedTuple):
    """The figures of a cell.

    Attributes:
        requests: Requests per second, with counting.
        microseconds: Processor time of the server for each request, with counting.
        rate: The ratio of the requests per second, with counting to without.
        processor: The ratio of the processor time for each request, with counting to without.
    """

    requests: float
    microseconds: float
    rate: Interval
    processor: Interval


def measure(cell: Cell, mount: Mounted, pairs: int, seconds: float) -> Costs:
    """Return the figures of a cell on a mounted disk.

    Raises:
        BenchmarkError: fio or the server failed.
    """
    begin = usage(mount.pid)
    runtime = WARM_UP_SECONDS + 2 * pairs * seconds + 1
    fio = subprocess.Popen(
        [
            *("fio", f"--name={cell.mode}", f"--filename={mount.disk}", f"--rw={cell.mode}"),
            *("--bs=4k", "--direct=1", "--ioengine=libaio", f"--iodepth={cell.depth}"),
            *(f"--size={DISK_MIB}m", "--time_based", f"--runtime={runtime}s", "--randseed=1"),
            *("--output-format=json", *cell.more),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    counted: list[Usage] = []
    other: list[Usage] = []
    try:
        time.sleep(WARM_UP_SECONDS)
        for number in range(pairs):
            turns = [(COUNT, counted), (DO_NOT_COUNT, other)]
            for which, found in turns if number % 2 else reversed(turns):
                os.kill(mount.pid, which)
                before = usage(mount.pid)
                time.sleep(seconds)
                found.append(usage(mount.pid).since(before))
        output, _ = fio.communicate(timeout=60)
    except BaseException:
        fio.kill()
        fio.wait()
        raise
    if fio.returncode:
        msg = f"{cell.name}: fio ended with {fio.returncode}"
        raise BenchmarkError(msg)
    (job,) = json.loads(output)["jobs"]
    ios = job["read" if cell.mode == "randread" else "write"]["total_ios"]
    bytes_per_request = usage(mount.pid).since(begin).transferred / ios
    return Costs(
        median(one.throughput for one in counted) / bytes_per_request,
        median(one.ns_per_byte for one in counted) * bytes_per_request / 1000,
        median_interval([a.throughput / b.throughput for a, b in zip(counted, other, strict=True)]),
        median_interval(
            [a.ns_per_byte / b.ns_per_byte for a, b in zip(counted, other, strict=True)]
        ),
    )


def compare(directory: Path, switchable: str, pairs: int, seconds: float) -> None:
    """Measure all cells, and print a line for each."""
    image = directory / "counting.qed"
    run(str(Path(program()).with_name("qedimg")), "create", "-q", str(image), f"{DISK_MIB}M")
    print(f"{'4 KiB O_DIRECT':20}{'requests/s':>11}{'ratio':>27}{'µs/request':>11}{'ratio':>27}")
    with Mounted(switchable, image, directory / "mnt") as mount:
        with mount.disk.open("r+b") as disk:
            for _ in range(DISK_MIB):
                disk.write(bytes(range(256)) * (MIB // 256))
        for cell in CELLS:
            costs = measure(cell, mount, pairs, seconds)
            print(
                f"{cell.name:20}{costs.requests:11.0f}{costs.rate!s:>27}"
                f"{costs.microseconds:11.1f}{costs.processor!s:>27}",
                flush=True,
            )
        mount.stop()


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Measure what counting the requests costs.")
    parser.add_argument("--dir", type=Path, help="where the image lies (default: a temporary one)")
    parser.add_argument("--pairs", type=int, default=300, help="times with and without (300)")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of each time (0.1)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        directory = Path(name)
        switchable = directory / "switchable.py"
        switchable.write_text(
            SWITCHABLE.format(
                python=sys.executable, count=int(COUNT), do_not_count=int(DO_NOT_COUNT)
            ),
            encoding="utf-8",
        )
        switchable.chmod(0o755)
        settings = f"{arguments.pairs} pairs of {arguments.seconds} s"
        for fact, value in facts(directory, program(), settings).items():
            print(f"{fact}: {value}")
        compare(directory, str(switchable), arguments.pairs, arguments.seconds)


if __name__ == "__main__":
    main()
