"""The loads: what is run against a disk, and what comes out of it as a number."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.cells import MIB, Fio
from benchmarks.reader import MARKER, WRONG_PREFIX
from benchmarks.servers import BenchmarkError, WrongDataError, run

if TYPE_CHECKING:
    from pathlib import Path

SLACK_SECONDS: Final = 60.0
"""How much longer than it should a load may take before it is given up."""
CHECK_SECONDS: Final = 300.0
"""How long a look at a whole disk may take."""
STRETCH: Final = 5
"""A load that ends after so many bytes gets so much more time, for the slower ones."""


class Result(NamedTuple):
    """What a measurement gave: a figure in the cell's unit, and how many writes."""

    figure: float
    writes: int = 0


def measure_fio(load: Fio, file: Path, seconds: float, unit: str, size: int) -> Result:
    """Run fio on a file that is there, and is ``size`` bytes long.

    Raises:
        BenchmarkError: It failed, or took far too long.
    """
    runtime = seconds * (STRETCH if load.max_bytes else 1)
    command = [
        *("fio", "--name=cell", f"--filename={str(file).replace(':', chr(92) + ':')}"),
        *(f"--rw={load.pattern}", f"--bs={load.block}", f"--direct={load.direct:d}"),
        *(f"--iodepth={load.depth}", f"--numjobs={load.processes}", "--group_reporting"),
        f"--ioengine={'libaio' if load.depth > 1 else 'psync'}",
        # The file is there and keeps its length; and its cache is none of fio's business.
        *("--allow_file_create=0", "--fallocate=none", "--invalidate=0"),
        *(f"--runtime={round(runtime * 1000)}ms", "--output-format=json"),
        f"--size={min(load.max_bytes, size)}" if load.max_bytes else "--time_based",
    ]
    if load.fsync:
        command.append("--fsync=1")
    if load.fsync_at_end:
        command.append("--end_fsync=1")
    if load.writes:
        # Each request says where it belongs, so that the disk can be checked afterwards.
        pattern = f'--verify_pattern=%o"{MARKER.decode()}"'
        command += ["--verify=pattern", pattern, "--do_verify=0"]
    job = _job(run(*command, seconds=runtime + SLACK_SECONDS))
    sides = [job[side] for side in ("read", "write")]
    figure = sum(side["iops"] if unit == "IOPS" else side["bw_bytes"] / MIB for side in sides)
    return Result(figure, job["write"]["total_ios"])


def _job(output: str) -> dict[str, Any]:
    """Give what fio says of its (only) group of processes."""
    # It may say something in plain words first.
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        msg = f"fio: found error {job['error']}, expected none"
        raise BenchmarkError(msg)
    return job


def verified_writes(file: Path) -> None:
    """Write at random, 16 in flight, and read all of it back, checksummed; not timed.

    Raises:
        BenchmarkError: Something else came back.
    """
    run(
        *("fio", "--name=verify", f"--filename={file}", "--rw=randwrite", "--bs=4k"),
        *("--size=16m", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c"),
        *("--verify_fatal=1", "--allow_file_create=0", "--fallocate=none"),
        seconds=2 * SLACK_SECONDS,
    )


def lay_out(file: Path, size: int) -> None:
    """Write a file of ``size`` bytes for fio to use."""
    run(
        *("fio", "--name=lay", f"--filename={file}", "--rw=write", "--bs=1m", "--end_fsync=1"),
        f"--size={size}",
        seconds=2 * SLACK_SECONDS,
    )


def read(word: str, disk: Path, *arguments: str) -> float:
    """Run `benchmarks.reader`.

    Raises:
        BenchmarkError: It failed, or took far too long.
        WrongDataError: What was read is not what should be there.
    """
    command = (sys.executable, "-m", "benchmarks.reader", word, str(disk), *arguments)
    output = run(*command, seconds=CHECK_SECONDS).strip()
    if output.startswith(WRONG_PREFIX):
        raise WrongDataError(output.removeprefix(WRONG_PREFIX))
    return float(output)


def copy_and_sync(tree: Path, target: Path) -> Result:
    """Copy a source tree into a file system and sync that; gives seconds."""
    start = time.monotonic()
    run("cp", "-a", str(tree), str(target), seconds=2 * SLACK_SECONDS)
    run("sync", "--file-system", str(target), seconds=2 * SLACK_SECONDS)
    return Result(time.monotonic() - start)


def read_with_tar(target: Path) -> Result:
    """Read a directory with tar; gives seconds."""
    start = time.monotonic()
    # By way of a pipe: tar does not read the files at all when it sees /dev/null.
    script = 'set -o pipefail; tar -cf - -C "$1" . | cat >/dev/null'
    run("bash", "-c", script, "bash", str(target), seconds=2 * SLACK_SECONDS)
    return Result(time.monotonic() - start)


def same_trees(one: Path, other: Path) -> None:
    """Compare two directories, file by file.

    Raises:
        BenchmarkError: They differ.
    """
    run("diff", "--recursive", "--brief", str(one), str(other), seconds=2 * SLACK_SECONDS)
