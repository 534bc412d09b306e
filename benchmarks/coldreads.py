"""Measure two ideas for cold reads that qedfuse does not use, to show what they could gain.

    python -m benchmarks.coldreads [--mib MIB] [--rounds ROUNDS] [--dir DIRECTORY]

*Slices of tables fetched ahead of a sequential reader.*  A disk is read in order, 1 MiB at a time,
with the host's cache empty: once with all tables in memory, and once with the first slice only.
The ratio of the two is the most that fetching slices ahead could gain.

*Neighbouring misses joined into one read.*  Runs of eight adjacent blocks of 4 KiB are read with 16
requests in flight, and single blocks for comparison.  What counts is how many requests the host's
disk gets for each read (/proc/diskstats), because the kernel joins adjacent requests itself.

Must be run as root, because only root may empty the host's cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.cachedreads import fio_command
from benchmarks.cells import Fio
from benchmarks.commands import BenchmarkError, run
from benchmarks.loads import measure_fio, sync_file_system
from benchmarks.machine import facts
from benchmarks.mounted import Mounted, program
from benchmarks.pagecache import drop_page_cache
from benchmarks.remote import make_objects
from benchmarks.report import with_range
from benchmarks.scale import ROOT

MIB: Final = 1 << 20
READS: Final = 16000
"""How many blocks are read in each round of the second experiment."""
PROGRAM_READS: Final = 16
"""How many blocks are read to find out what the start of fio itself asks of the disk."""
READ_SECONDS: Final = 60.0
"""How long a sequential pass may take."""
_READ_FIELDS: Final = slice(3, 6)
"""In /proc/diskstats: requests for reads, those that were joined to others, and sectors read."""
_LOAD_TABLES: Final = """\
import os, sys
disk = os.open(sys.argv[1], os.O_RDONLY)
os.pread(disk, 4096, 0)
for offset in range(0, int(sys.argv[2]), 16 << 20):
    os.lseek(disk, offset, os.SEEK_DATA)
    os.lseek(disk, offset, os.SEEK_HOLE)
"""
"""A program that makes the server look up the beginning of a disk, and load all that it needs to
answer reads."""


def empty_cache(directory: Path) -> None:
    """Write back and drop what the host's cache has."""
    sync_file_system(directory)
    drop_page_cache()


def read_in_order(image: Path, directory: Path, *, with_tables: bool) -> float:
    """Return the MiB/s of a sequential reader of a new mount, with or without tables in memory.

    Raises:
        BenchmarkError: The mount or the reader failed.
    """
    with Mounted(program(), image, directory / "mnt", "-r") as mount:
        size = mount.disk.stat().st_size
        run(sys.executable, "-c", _LOAD_TABLES, str(mount.disk), str(size if with_tables else 1))
        empty_cache(directory)
        result = measure_fio(
            [Fio("read", MIB, max_bytes=size)], [mount.disk], READ_SECONDS, "MiB/s", size
        )
        mount.stop()
    return result.figure


def print_slices(directory: Path, mib: int, rounds: int) -> None:
    """Measure what fetching slices ahead could gain, and print a row for each cluster size."""
    print("| clusters | tables in memory, MiB/s | first slice only, MiB/s | ratio of a round |")
    print("| --- | --- | --- | --- |")
    for cluster_bytes in (4096, 65536):
        _, image = make_objects(directory, mib, cluster_bytes)
        rates: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds):
            for with_tables in (True, False) if number % 2 else (False, True):
                rates[with_tables].append(read_in_order(image, directory, with_tables=with_tables))
        ratios = [a / b for a, b in zip(rates[True], rates[False], strict=True)]
        row = (f"{cluster_bytes >> 10} KiB", *map(with_range, (*rates.values(), ratios)))
        print(f"| {' | '.join(row)} |", flush=True)


def disk_requests(disk: Path, directory: Path, pattern: str, reads: int) -> tuple[int, ...]:
    """Read blocks of 4 KiB; return what the host's disk got: requests, joined ones, sectors.

    Raises:
        BenchmarkError: fio failed.
    """
    empty_cache(directory)
    before = _counters(directory)
    options = (f"--rw={pattern}", "--bs=4k", "--iodepth=16", f"--number_ios={reads}")
    run(*fio_command(disk, options), seconds=300)
    return tuple(b - a for a, b in zip(before, _counters(directory), strict=True))


def _counters(directory: Path) -> list[int]:
    """Return the counters of the device that has a directory."""
    device = directory.stat().st_dev
    name = f"{os.major(device)} {os.minor(device)} "
    for line in Path("/proc/diskstats").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if f"{fields[0]} {fields[1]} " == name:
            return [int(field) for field in fields[_READ_FIELDS]]
    msg = f"{directory}: found no counters of its device in /proc/diskstats"
    raise BenchmarkError(msg)


def print_neighbours(directory: Path, mib: int, rounds: int) -> None:
    """Measure how many requests neighbouring misses cost, and print a row for each pattern."""
    print("| blocks | disk requests per read | joined per read | sectors per read |")
    print("| --- | --- | --- | --- |")
    _, image = make_objects(directory, mib)
    for title, pattern in (("single", "randread"), ("runs of 8", "randread:8")):
        figures: list[list[float]] = []
        for _ in range(rounds):
            with Mounted(program(), image, directory / "mnt", "-r") as mount:
                # What the start of fio reads from the disk does not count.
                start = disk_requests(mount.disk, directory, pattern, PROGRAM_READS)
                found = disk_requests(mount.disk, directory, pattern, READS)
                count = READS - PROGRAM_READS
                figures.append([(b - a) / count for a, b in zip(start, found, strict=True)])
                mount.stop()
        columns = [with_range(column) for column in zip(*figures, strict=True)]
        print(f"| {title} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    """Parse the arguments, measure, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT, help="where twice the MiB are free")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="qedfuse-cold-", dir=arguments.dir) as name:
            directory = Path(name)
            settings = f"{arguments.rounds} rounds, {arguments.mib} MiB"
            about = facts(directory, program(), settings)
            print("".join(f"- {fact}: {found}\n" for fact, found in about.items()))
            print_slices(directory, arguments.mib, arguments.rounds)
            print()
            print_neighbours(directory, arguments.mib, arguments.rounds)
    except (BenchmarkError, OSError) as error:
        sys.exit(f"coldreads: {error}")


if __name__ == "__main__":
    main()
