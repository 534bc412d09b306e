"""Measure reads of an image on a server, cold, cached and without the server, beside others.

    python -m benchmarks.remote [--mib MIB] [--rounds ROUNDS] [--seconds SECONDS] [--dir DIRECTORY]

The servers are those of the tests, on this machine: nginx, and OpenStack Swift if it is installed.
Each program shows the same content as a file.  qedfuse reads a QED image; nbdkit with nbdfuse, and
rclone with its cache, read a raw file.  A program that is not installed is left out, and one
that fails is not measured again.  The curl driver of QEMU 7.2 is not measured: with several reads
in flight it stops answering.

All reads use O_DIRECT, so each is a request.  In each round the programs take turns, each starts
anew with an empty cache, and is measured in this order:

    cold sequential   all of the disk, 1 MiB at a time
    cached            the same and random reads, when all of the disk was read once, and what the
                      program has written meanwhile is on the disk
    cold random       a few reads of 4 KiB, 16 in flight, after another start

At the end of each round the content is compared.  Without the server qedfuse starts again with the
cache that it had; the time until it has mounted is measured, and random reads of 4 KiB.

The output is a table of medians, with the smallest and the largest figure.  "Ratio" is to the
fastest other program, "to local" is to qedfuse with the image on the local disk in the same rounds.
Under "CPU" is the processor time of qedfuse per request, and in brackets the ratio to that with a
local image, which depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.cells import Fio
from benchmarks.commands import BenchmarkError, run
from benchmarks.cputime import cpu_time
from benchmarks.loads import measure_fio, read, sync_file_system
from benchmarks.machine import facts
from benchmarks.mounted import program
from benchmarks.remotesystems import (
    KEY,
    PROGRAMS,
    TITLES,
    Mount,
    Source,
    Started,
    System,
    how_to_start,
)
from benchmarks.report import number, with_range
from benchmarks.rounds import rotated_orders
from benchmarks.scale import ROOT
from tests.support.nginx import serving_nginx, why_no_nginx
from tests.support.swift import serving_swift, why_no_swift

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB: Final = 1 << 20
COLD_READS: Final = 512


class Cell(NamedTuple):
    """A load: its title, what fio does, and the unit of its figure."""

    title: str
    load: Fio
    unit: str


COLD: Final = Cell("sequential, 1 MiB, cold", Fio("read", MIB), "MiB/s")
COLD_RANDOM: Final = Cell(
    "random, 4 KiB, 16 in flight, cold",
    Fio("randread", 4096, depth=16, max_bytes=COLD_READS * 4096),
    "IOPS",
)
CACHED: Final = (
    Cell("sequential, 1 MiB, cached", Fio("read", MIB), "MiB/s"),
    Cell("random, 64 KiB, 4 in flight, cached", Fio("randread", 65536, depth=4), "IOPS"),
    Cell("random, 4 KiB, 16 in flight, cached", Fio("randread", 4096, depth=16), "IOPS"),
)
OFFLINE: Final = Cell("random, 4 KiB, 16 in flight, no server", CACHED[-1].load, "IOPS")
OFFLINE_START: Final = "start, no server"


class Figures:
    """The figures, and the processor time per request, of each load and system."""

    def __init__(self) -> None:
        """Start without figures."""
        self.rates: dict[tuple[str, System], list[float]] = {}
        self.micros: dict[tuple[str, System], list[float]] = {}

    def measure(self, cell: Cell, system: System, mount: Mount, size: int, seconds: float) -> None:
        """Run a load on a mounted disk of ``size`` bytes, and record what it gives.

        Raises:
            BenchmarkError: The load failed.
        """
        before = cpu_time(mount.pid)
        result = measure_fio([cell.load], [mount.disk], seconds, cell.unit, size)
        used = cpu_time(mount.pid).minus(before).total
        self.rates.setdefault((cell.title, system), []).append(result.figure)
        if result.requests:
            micros = self.micros.setdefault((cell.title, system), [])
            micros.append(used / result.requests * 1e6)

    def row(self, title: str, unit: str, systems: Sequence[System]) -> str:
        """Return the row of a load in the table."""
        rates = {system: self.rates.get((title, system)) for system in systems}
        cells = [with_range(found) if found else "" for found in rates.values()]
        medians = {system: median(found) for system, found in rates.items() if found}
        own = medians.pop("qedfuse", None)
        local = medians.pop("local", None)
        peer = max(medians.values(), default=None)
        micros = [self.micros.get((title, system)) for system in ("qedfuse", "local")]
        cost = [median(found) for found in micros if found]
        cells += [
            number(own / peer) if own and peer else "",
            number(own / local) if own and local else "",
            f"{number(cost[0])} µs ({number(cost[0] / cost[1])})" if len(cost) > 1 else "",
        ]
        return f"| {title} | {unit} | {' | '.join(cells)} |"


class Bench:
    """Measures one server."""

    def __init__(self, source: Source, raw: Path, directory: Path, seconds: float) -> None:
        """Measure ``source``, whose disk has the content of ``raw``, for ``seconds`` per load."""
        self.figures = Figures()
        self._source = source
        self._raw = raw
        self._size = raw.stat().st_size
        self._directory = directory
        self._seconds = seconds

    def systems(self) -> list[System]:
        """Return the systems that can read from the server here."""
        found: list[System] = ["qedfuse", "local"]
        for system, name in PROGRAMS.items():
            can_read = not self._source.is_store or system == "rclone"
            if can_read and shutil.which(name):
                found.append(system)
        return found

    def run_round(self, system: System) -> None:
        """Measure a system once.

        Raises:
            BenchmarkError: The system failed, or has shown other content.
        """
        figures, size = self.figures, self._size
        with self._started(system) as started, Mount(started, self._log(system)) as mount:
            once = COLD._replace(load=Fio("read", MIB, max_bytes=size))
            if system != "local":
                figures.measure(once, system, mount, size, self._seconds)
            else:
                read("check", mount.disk, str(self._raw))
            sync_file_system(self._directory)
            for cell in CACHED:
                figures.measure(cell, system, mount, size, self._seconds)
            read("check", mount.disk, str(self._raw))
        if system == "local":
            return
        with self._started(system) as started, Mount(started, self._log(system)) as mount:
            figures.measure(COLD_RANDOM, system, mount, size, self._seconds)

    def fill(self, stack: ExitStack) -> Started:
        """Fill a cache of qedfuse; return how to start with it; ``stack`` removes the cache."""
        started = stack.enter_context(self._started("qedfuse"))
        with Mount(started, self._log("qedfuse")) as mount:
            read("check", mount.disk, str(self._raw))
        return started

    def run_offline(self, started: Started, rounds: int) -> None:
        """Measure qedfuse with a full cache while the server is gone.

        Raises:
            BenchmarkError: qedfuse failed, or has shown other content.
        """
        for _ in range(rounds):
            with Mount(started, self._log("qedfuse")) as mount:
                starts = self.figures.rates.setdefault((OFFLINE_START, "qedfuse"), [])
                starts.append(mount.start_seconds)
                read("check", mount.disk, str(self._raw))
                self.figures.measure(OFFLINE, "qedfuse", mount, self._size, self._seconds)

    def _started(self, system: System) -> _SystemDirectory:
        return _SystemDirectory(system, self._source, self._directory)

    def _log(self, system: System) -> Path:
        return self._directory / f"{system}.log"


class _SystemDirectory:
    """A directory with the caches of a system that is started, removed at the end."""

    def __init__(self, system: System, source: Source, directory: Path) -> None:
        self._arguments = (system, source)
        self._temporary = tempfile.TemporaryDirectory(dir=directory, ignore_cleanup_errors=True)

    def __enter__(self) -> Started:
        system, source = self._arguments
        return how_to_start(system, source, Path(self._temporary.__enter__()), program())

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()


def make_objects(directory: Path, mib: int, cluster_bytes: int = 65536) -> tuple[Path, Path]:
    """Make a raw file of random bytes, and a QED image with its content; return both."""
    raw, image = directory / f"{KEY}.raw", directory / f"{KEY}.qed"
    with raw.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
    options = ("-O", "qed", "-o", f"cluster_size={cluster_bytes}")
    run("qemu-img", "convert", *options, str(raw), str(image), seconds=600)
    return raw, image


def measure(bench: Bench, rounds: int, stop: ExitStack) -> list[str]:
    """Measure a server; return the lines of its table.  ``stop`` stops the server."""
    systems = bench.systems()
    with ExitStack() as stack:
        failed: set[System] = set()
        for order in rotated_orders(systems, rounds):
            for system in order:
                if system in failed:
                    continue
                try:
                    bench.run_round(system)
                except BenchmarkError as error:
                    if system not in PROGRAMS:
                        raise
                    failed.add(system)
                    print(f"{TITLES[system]}: {error}", file=sys.stderr)
        filled = bench.fill(stack)
        stop.close()
        bench.run_offline(filled, rounds)
    head = ["read", "unit", *(TITLES[system] for system in systems), "ratio", "to local", "CPU"]
    rows = [
        bench.figures.row(cell.title, cell.unit, systems)
        for cell in (COLD, COLD_RANDOM, *CACHED, OFFLINE)
    ]
    rows.append(bench.figures.row(OFFLINE_START, "s", systems))
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows]


def main() -> None:
    """Parse the arguments, measure, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT, help="where four times the MiB are free")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    settings = f"{arguments.rounds} rounds of {arguments.seconds:g} s, {arguments.mib} MiB"
    try:
        with tempfile.TemporaryDirectory(prefix="qedfuse-remote-", dir=arguments.dir) as name:
            directory = Path(name)
            about = facts(directory, program(), settings)
            print("".join(f"- {name}: {fact}\n" for name, fact in about.items()))
            raw, image = make_objects(directory, arguments.mib)
            for title in ("nginx", "Swift"):
                reason = why_no_nginx() if title == "nginx" else why_no_swift()
                if reason:
                    print(f"{title}: {reason}", file=sys.stderr)
                    continue
                with ExitStack() as stop:
                    source = serve(title, raw, image, directory, stop)
                    bench = Bench(source, raw, directory, arguments.seconds)
                    lines = measure(bench, arguments.rounds, stop)
                print(f"{title}:\n\n" + "\n".join(lines) + "\n", flush=True)
    except (BenchmarkError, OSError) as error:
        sys.exit(f"remote: {error}")


def serve(title: str, raw: Path, image: Path, directory: Path, stop: ExitStack) -> Source:
    """Start a server that has the objects; ``stop`` stops it."""
    if title == "nginx":
        nginx = stop.enter_context(serving_nginx(directory / "nginx"))
        for path in (raw, image):
            shutil.copyfile(path, nginx.directory / path.name)
        # rclone finds files by links.
        page = f'<a href="{raw.name}">{raw.name}</a>'
        (nginx.directory / "index.html").write_text(page, encoding="utf-8")
        return Source(nginx.http, image, {})
    swift = stop.enter_context(serving_swift(directory / "swift"))
    swift.make_bucket(KEY)
    for path in (raw, image):
        swift.put(KEY, path.name, path.read_bytes())
    return Source(f"s3://{KEY}", image, swift.variables)


if __name__ == "__main__":
    main()
