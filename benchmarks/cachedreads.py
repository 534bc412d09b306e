"""Compare the processor time of cached reads of an image on a server with that of a local image.

    python -m benchmarks.cachedreads [--server nginx|Swift] [--mib MIB] [--repetitions N]

Two mounts have the same content.  Both are read at the same time by one fio each, of which one is
stopped while the other runs, by turns of 50 ms.  So what else the machine does costs both the same.
For each cell the ratio is that of the processor time for each read.  A repetition measures it
twice, with each of the two mounts as the first, and takes the geometric mean; the table has the
median of the repetitions, with the smallest and the largest.  The cells are measured in
three states:

    fetched            the disk was read from the server; what this wrote is on the disk
    restarted          the page cache was emptied, the server is gone, and both mounts are new;
                       then the disk was read in order
    restarted, random  the same, but then the disk was read in pieces of 64 KiB in random order

Must be run as root, because only root may empty the page cache.
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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.commands import BenchmarkError, run
from benchmarks.cputime import cpu_time
from benchmarks.loads import read, sync_file_system
from benchmarks.machine import facts
from benchmarks.mounted import program
from benchmarks.pagecache import drop_page_cache
from benchmarks.remote import make_objects, serve
from benchmarks.remotesystems import Mount, Source, System, how_to_start
from benchmarks.report import with_range
from benchmarks.scale import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEMS: Final[tuple[System, System]] = ("qedfuse", "local")
TURN_SECONDS: Final = 0.05
TURNS: Final = 20
"""How many turns each mount has in a repetition."""
START_SECONDS: Final = 0.5
"""How long fio is given to start."""


class Cell(NamedTuple):
    """A load: its title and the options of fio."""

    title: str
    options: tuple[str, ...]


CELLS: Final = (
    Cell("random, 4 KiB, 16 in flight", ("--rw=randread", "--bs=4k", "--iodepth=16")),
    Cell("random, 64 KiB, 4 in flight", ("--rw=randread", "--bs=64k", "--iodepth=4")),
    Cell("sequential, 1 MiB", ("--rw=read", "--bs=1m", "--iodepth=1")),
)
RANDOM_PASS: Final = ("--rw=randread", "--bs=64k", "--iodepth=4")


def fio_command(disk: Path, options: tuple[str, ...]) -> list[str]:
    """Return the command that reads a disk with O_DIRECT."""
    command = ["fio", "--name=read", f"--filename={disk}", "--direct=1", "--ioengine=libaio"]
    return [*command, "--readonly", "--invalidate=0", "--output-format=json", *options]


class Load:
    """A fio that reads a disk, stopped except during its turns."""

    def __init__(self, mount: Mount, cell: Cell, seconds: float) -> None:
        """Start fio, which reads for ``seconds``, the time during which it is stopped included."""
        self._pid = mount.pid
        self._before = cpu_time(mount.pid)
        self._process = subprocess.Popen(
            [
                *fio_command(mount.disk, cell.options),
                *("--time_based", f"--runtime={seconds}s"),
            ],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Stop fio."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let fio go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def take_turn(self) -> None:
        """Let fio read for the length of a turn."""
        self.go_on()
        time.sleep(TURN_SECONDS)
        self.stop()

    def seconds_per_read(self) -> float:
        """Let fio end; return the processor time of the server for each read.

        Raises:
            BenchmarkError: fio failed.
        """
        self.go_on()
        output, _ = self._process.communicate(timeout=60)
        if self._process.returncode:
            msg = f"fio ended with {self._process.returncode}"
            raise BenchmarkError(msg)
        (job,) = json.loads(output)["jobs"]
        return float(cpu_time(self._pid).minus(self._before).total / job["read"]["total_ios"])

    def kill(self) -> None:
        """Kill fio if it still runs."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def compare(mounts: Mapping[System, Mount], cell: Cell) -> float:
    """Return the ratio of the processor time for each read: of the first system to the second.

    Raises:
        BenchmarkError: fio or a server failed.
    """
    # The order in which the loads start changes their figures by some per cent.
    one, other = SYSTEMS
    first, last = measure_turns(mounts, cell, SYSTEMS), measure_turns(mounts, cell, (other, one))
    return math.sqrt(first[one] / first[other] * last[one] / last[other])


def measure_turns(
    mounts: Mapping[System, Mount], cell: Cell, order: tuple[System, System]
) -> dict[System, float]:
    """Return the processor seconds for each read of two systems, which read by turns.

    Raises:
        BenchmarkError: fio or a server failed.
    """
    seconds = START_SECONDS + 2 * TURNS * TURN_SECONDS
    loads = []
    with ExitStack() as stack:
        for system in order:
            load = Load(mounts[system], cell, seconds)
            stack.callback(load.kill)
            loads.append(load)
            time.sleep(START_SECONDS)
            load.stop()
        for _ in range(TURNS):
            for load in loads:
                load.take_turn()
        return {system: load.seconds_per_read() for system, load in zip(order, loads, strict=True)}


def print_state(state: str, mounts: Mapping[System, Mount], repetitions: int) -> None:
    """Measure all cells, and print a row of the table for each."""
    for cell in CELLS:
        ratios = [compare(mounts, cell) for _ in range(repetitions)]
        print(f"| {state} | {cell.title} | {with_range(ratios)} |", flush=True)


def measure(source: Source, raw: Path, directory: Path, repetitions: int, stop: ExitStack) -> None:
    """Measure all states, and print the table.  ``stop`` stops the server.

    Raises:
        BenchmarkError: A mount or a load failed.
        WrongDataError: A mount has shown other content.
    """
    started = {}
    for system in SYSTEMS:
        (directory / system).mkdir()
        started[system] = how_to_start(system, source, directory / system, program())

    print("| state | read | ratio of the processor time |\n| --- | --- | --- |")
    for state in ("fetched", "restarted", "restarted, random"):
        with ExitStack() as stack:
            mounts = {
                system: stack.enter_context(Mount(started[system], directory / f"{system}.log"))
                for system in SYSTEMS
            }
            for mount in mounts.values():
                if state == "restarted, random":
                    run(*fio_command(mount.disk, RANDOM_PASS), seconds=300)
                read("check", mount.disk, str(raw))
            sync_file_system(directory)
            print_state(state, mounts, repetitions)
        stop.close()
        sync_file_system(directory)
        drop_page_cache()


def main() -> None:
    """Parse the arguments, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT, help="where four times the MiB are free")
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--server", choices=("nginx", "Swift"), default="nginx")
    arguments = parser.parse_args()
    settings = f"{arguments.repetitions} repetitions, {arguments.mib} MiB on {arguments.server}"
    try:
        with (
            tempfile.TemporaryDirectory(prefix="qedfuse-cached-", dir=arguments.dir) as name,
            ExitStack() as stop,
        ):
            directory = Path(name)
            about = facts(directory, program(), settings)
            print("".join(f"- {fact}: {found}\n" for fact, found in about.items()))
            raw, image = make_objects(directory, arguments.mib)
            source = serve(arguments.server, raw, image, directory, stop)
            measure(source, raw, directory, arguments.repetitions, stop)
    except (BenchmarkError, OSError) as error:
        sys.exit(f"cachedreads: {error}")


if __name__ == "__main__":
    main()
