"""The loads: programs that run against a disk, and the figure that each gives."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.cells import MIB, Fio
from benchmarks.commands import BenchmarkError, WrongDataError, run
from benchmarks.reader import MARKER, WRONG_PREFIX

if TYPE_CHECKING:
    from pathlib import Path

SLACK_SECONDS: Final = 60.0
"""How much longer than expected a load may take before it is killed."""
CHECK_SECONDS: Final = 300.0
"""How long the verification of a whole disk may take."""
TIME_FACTOR: Final = 5
"""How much more time a load with a limit in bytes gets, so that slow systems reach it."""


class Result(NamedTuple):
    """The result of a measurement: a figure in the cell's unit, and the number of writes."""

    figure: float
    writes: int = 0


def measure_fio(load: Fio, file: Path, seconds: float, unit: str, size: int) -> Result:
    """Run fio on an existing file of ``size`` bytes.

    Raises:
        BenchmarkError: It failed, or took far too long.
    """
    runtime = seconds * (TIME_FACTOR if load.max_bytes else 1)
    command = [
        *("fio", "--name=cell", f"--filename={str(file).replace(':', chr(92) + ':')}"),
        *(f"--rw={load.pattern}", f"--bs={load.block}", f"--direct={load.direct:d}"),
        *(f"--iodepth={load.depth}", f"--numjobs={load.processes}", "--group_reporting"),
        f"--ioengine={'libaio' if load.depth > 1 else 'psync'}",
        # fio must neither change the length of the file nor drop its cache.
        *("--allow_file_create=0", "--fallocate=none", "--invalidate=0"),
        *(f"--runtime={round(runtime * 1000)}ms", "--output-format=json"),
        f"--size={min(load.max_bytes, size)}" if load.max_bytes else "--time_based",
    ]
    if load.fsync:
        command.append("--fsync=1")
    if load.fsync_at_end:
        command.append("--end_fsync=1")
    if load.writes:
        # Each request contains its offset, so that the disk can be verified afterwards.
        pattern = f'--verify_pattern=%o"{MARKER.decode()}"'
        command += ["--verify=pattern", pattern, "--do_verify=0"]
    job = _job(run(*command, seconds=runtime + SLACK_SECONDS))
    sides = [job[side] for side in ("read", "write")]
    figure = sum(side["iops"] if unit == "IOPS" else side["bw_bytes"] / MIB for side in sides)
    return Result(figure, job["write"]["total_ios"])


def _job(output: str) -> dict[str, Any]:
    """Return fio's results for its only group of processes."""
    # fio may print plain text before the JSON.
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        msg = f"fio: found error {job['error']}, expected none"
        raise BenchmarkError(msg)
    return job


def verified_writes(file: Path) -> None:
    """Write at random with 16 requests in flight, and verify the checksums of what is read.

    Raises:
        BenchmarkError: Other data was read.
    """
    run(
        *("fio", "--name=verify", f"--filename={file}", "--rw=randwrite", "--bs=4k"),
        *("--size=16m", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c"),
        *("--verify_fatal=1", "--allow_file_create=0", "--fallocate=none"),
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
        BenchmarkError: It failed, or took far too long.
        WrongDataError: The disk has other content than expected.
    """
    command = (sys.executable, "-m", "benchmarks.reader", word, str(disk), *arguments)
    output = run(*command, seconds=CHECK_SECONDS).strip()
    if output.startswith(WRONG_PREFIX):
        raise WrongDataError(output.removeprefix(WRONG_PREFIX))
    return float(output)


def copy_and_sync(tree: Path, target: Path) -> Result:
    """Copy a source tree into a file system and sync it; the result is in seconds."""
    start = time.monotonic()
    run("cp", "-a", str(tree), str(target), seconds=2 * SLACK_SECONDS)
    run("sync", "--file-system", str(target), seconds=2 * SLACK_SECONDS)
    return Result(time.monotonic() - start)


def read_with_tar(target: Path) -> Result:
    """Read a directory with tar; the result is in seconds."""
    start = time.monotonic()
    # Through a pipe: with /dev/null as its output tar does not read the files.
    script = 'set -o pipefail; tar -cf - -C "$1" . | cat >/dev/null'
    run("bash", "-c", script, "bash", str(target), seconds=2 * SLACK_SECONDS)
    return Result(time.monotonic() - start)


def same_trees(one: Path, other: Path) -> None:
    """Compare two directories, file by file.

    Raises:
        BenchmarkError: They differ.
    """
    run("diff", "--recursive", "--brief", str(one), str(other), seconds=2 * SLACK_SECONDS)
