"""The loads: programs that run against a disk, and the figure that each gives."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.cells import MIB
from benchmarks.commands import BenchmarkError, WrongDataError, run
from benchmarks.reader import MARKER, WRONG_PREFIX

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.cells import Fio

SLACK_SECONDS: Final = 60.0
"""How much longer than expected a load may take before it is killed."""
CHECK_SECONDS: Final = 300.0
"""How long the verification of a whole disk may take."""
FILL_SECONDS: Final = 10.0
"""How long the first pass over an area should take at most, before `TIME_FACTOR`."""
SEEKS_PER_WALK: Final = 2
"""How often `benchmarks.reader` calls lseek for a walk over the disk with one hole."""
TIME_FACTOR: Final = 5
"""How much more time a load with a limit in bytes gets, so that slow systems reach the limit."""


class Result(NamedTuple):
    """The result of a measurement.

    Attributes:
        figure: The figure in the cell's unit.
        requests: The number of the program's reads, writes and seeks; 0 if it is unknown.
        moved: The number of bytes that were read and written.
        writes: The number of writes to each disk.
    """

    figure: float
    requests: int = 0
    moved: int = 0
    writes: tuple[int, ...] = (0,)


def measure_fio(
    loads: Sequence[Fio], files: Sequence[Path], seconds: float, unit: str, size: int
) -> Result:
    """Run fio's loads concurrently, each on an existing file of ``size`` bytes.

    The figure is their sum.

    Raises:
        BenchmarkError: fio failed, or took far too long.
    """
    runtime = seconds * (TIME_FACTOR if any(load.max_bytes for load in loads) else 1)
    command = ["fio", "--output-format=json", f"--runtime={round(runtime * 1000)}ms"]
    for number, (load, file) in enumerate(zip(loads, files, strict=True)):
        command += [f"--name=disk{number}", *_job_options(load, file, size)]
    output = run(*command, seconds=runtime + SLACK_SECONDS)
    return parse_fio(output, unit)


def _job_options(load: Fio, file: Path, size: int) -> list[str]:
    """Return the options of one load."""
    options = [
        f"--filename={str(file).replace(':', chr(92) + ':')}",
        *(f"--rw={load.pattern}", f"--bs={load.block}", f"--direct={load.direct:d}"),
        *(f"--iodepth={load.depth}", f"--numjobs={load.processes}"),
        # fio reports the processes of one load together, and each load separately.
        *("--group_reporting", "--new_group"),
        f"--ioengine={'libaio' if load.depth > 1 else 'psync'}",
        # fio must neither change the length of the file nor drop its cache.
        *("--allow_file_create=0", "--fallocate=none", "--invalidate=0"),
    ]
    if load.max_bytes:
        options.append(f"--size={min(load.max_bytes, size)}")
    else:
        options += [f"--size={min(load.area or size, size)}", "--time_based"]
    if load.fsync:
        options.append("--fsync=1")
    if load.fsync_at_end:
        options.append("--end_fsync=1")
    if load.writes:
        # Each request contains its offset, so that the disk can be verified afterwards.
        pattern = f'--verify_pattern=%o"{MARKER.decode()}"'
        options += ["--verify=pattern", pattern, "--do_verify=0", "--verify_state_save=0"]
    return options


def parse_fio(output: str, unit: str) -> Result:
    """Return the result in fio's JSON, which has an object for each load.

    Raises:
        BenchmarkError: A load has failed.
    """
    # fio may print plain text before the JSON.
    jobs: list[dict[str, Any]] = json.loads(output[output.index("{") :])["jobs"]
    for job in jobs:
        if job["error"]:
            msg = f"fio: found error {job['error']}, expected none"
            raise BenchmarkError(msg)
    sides = [job[side] for job in jobs for side in ("read", "write")]
    return Result(
        sum(side["iops"] if unit == "IOPS" else side["bw_bytes"] / MIB for side in sides),
        sum(side["total_ios"] for side in sides),
        sum(side["io_bytes"] for side in sides),
        tuple(job["write"]["total_ios"] for job in jobs),
    )


def fill_area(load: Fio, file: Path) -> int:
    """Write each block of a load's area once, in writes as long as the load's; return their number.

    Raises:
        BenchmarkError: fio failed, or took far too long.
    """
    once = replace(load, max_bytes=load.area)
    return measure_fio([once], [file], FILL_SECONDS, "IOPS", load.area).writes[0]


def verified_writes(file: Path) -> None:
    """Write at random with 16 requests in flight, and verify the checksums of what is read.

    Raises:
        BenchmarkError: Other data was read.
    """
    run(
        *("fio", "--name=verify", f"--filename={file}", "--rw=randwrite", "--bs=4k"),
        *("--size=16m", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c"),
        *("--verify_fatal=1", "--verify_state_save=0"),
        *("--allow_file_create=0", "--fallocate=none"),
        seconds=2 * SLACK_SECONDS,
    )


def lay_out(file: Path, size: int) -> None:
    """Create a file of ``size`` bytes for fio."""
    run(
        *("fio", "--name=lay", f"--filename={file}", "--rw=write", "--bs=1m", "--end_fsync=1"),
        f"--size={size}",
        seconds=2 * SLACK_SECONDS,
    )


def read(word: str, disk: Path, *arguments: str) -> float:
    """Run `benchmarks.reader`, and return the number that it prints.

    Raises:
        BenchmarkError: The reader failed, or took far too long.
        WrongDataError: The disk has other content than expected.
    """
    command = (sys.executable, "-m", "benchmarks.reader", word, str(disk), *arguments)
    output = run(*command, seconds=CHECK_SECONDS).strip()
    if output.startswith(WRONG_PREFIX):
        raise WrongDataError(output.removeprefix(WRONG_PREFIX))
    return float(output)


def walk(disk: Path, seconds: float) -> Result:
    """Find all holes of a disk repeatedly; the result is in walks per second.

    Raises:
        BenchmarkError: The reader failed, or took far too long.
        WrongDataError: The holes are elsewhere.
    """
    rate = read("walk", disk, str(seconds))
    return Result(rate, requests=round(rate * seconds) * SEEKS_PER_WALK)


def sync_file_system(target: Path) -> None:
    """Write back everything that is dirty in the file system of a path."""
    run("sync", "--file-system", str(target), seconds=2 * SLACK_SECONDS)


def sync_disk(disk: Path) -> None:
    """Call fsync on a disk."""
    run("sync", str(disk), seconds=2 * SLACK_SECONDS)


def copy_disk(disk: Path, target: Path, size: int) -> Result:
    """Copy a disk of ``size`` bytes to a file with cp; the result is in seconds."""
    start = time.monotonic()
    run("cp", str(disk), str(target), seconds=2 * SLACK_SECONDS)
    return Result(time.monotonic() - start, moved=size)


def copy_and_sync(tree: Path, target: Path) -> Result:
    """Copy a source tree into a file system and sync it; the result is in seconds."""
    start = time.monotonic()
    run("cp", "-a", str(tree), str(target), seconds=2 * SLACK_SECONDS)
    sync_file_system(target)
    return Result(time.monotonic() - start, moved=_file_bytes(tree))


def read_with_tar(target: Path, tree: Path) -> Result:
    """Read a copy of a source tree with tar; the result is in seconds."""
    start = time.monotonic()
    # Through a pipe: with /dev/null as its output tar does not read the files.
    script = 'set -o pipefail; tar -cf - -C "$1" . | cat >/dev/null'
    run("bash", "-c", script, "bash", str(target), seconds=2 * SLACK_SECONDS)
    return Result(time.monotonic() - start, moved=_file_bytes(tree))


def _file_bytes(tree: Path) -> int:
    """Return the sum of the sizes of the files in a directory."""
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())


def same_trees(one: Path, other: Path) -> None:
    """Compare two directories, file by file.

    Raises:
        BenchmarkError: The directories differ.
    """
    run("diff", "--recursive", "--brief", str(one), str(other), seconds=2 * SLACK_SECONDS)
