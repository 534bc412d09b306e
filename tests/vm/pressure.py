"""Memory pressure: a server and programs that write to its disk share too little memory.

Runs as root in the virtual machine.  Prints a table: how much each writer wrote, and its
longest gap between two steps.  A case fails if a gap is longer than `LONGEST_GAP_SECONDS`,
if the server was killed, if written data is not there, or if a check finds an error.
"""

from __future__ import annotations

import argparse
import mmap
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LONGEST_GAP_SECONDS: Final = 5.0
CGROUP_BYTES: Final = 200 << 20
DISK_BYTES: Final = 4 << 30
STEP_BYTES: Final = 1 << 20
COMMAND_TIMEOUT_SECONDS: Final = 300
"""Timeout of commands; an unmount writes back all dirty pages of a case."""

_CGROUP: Final = Path("/sys/fs/cgroup/pressure")
_WORK: Final = Path("/var/tmp/pressure")  # noqa: S108  the machine is discarded
_IMAGE: Final = _WORK / "vm.qed"
_MOUNTPOINT: Final = _WORK / "disk"
_RAW: Final = _MOUNTPOINT / "vm.raw"
_FILES: Final = _WORK / "files"


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        name: Its name in the table.
        writer: ``raw`` and ``mmap`` write to the mounted file, ``ext4`` and ``ext4-mmap`` to
            a file on ext4 on a loop device over it.
        in_cgroup: Server and writer share a memory cgroup with a limit; else there is none.
        direct_io: How the loop device is attached.
        trim: Files are deleted and trimmed meanwhile.
        flag: Without it the server has no CAP_SYS_RESOURCE, hence no ``PR_SET_IO_FLUSHER``.
    """

    name: str
    writer: str
    in_cgroup: bool = True
    direct_io: bool = True
    trim: bool = False
    flag: bool = True


CASES: Final = (
    Case("no-flag", "ext4", flag=False),
    Case("no-flag-buffered-loop", "ext4", direct_io=False, flag=False),
    Case("direct-loop", "ext4"),
    Case("buffered-loop", "ext4", direct_io=False),
    Case("direct-loop-trim", "ext4", trim=True),
    Case("buffered-loop-trim", "ext4", direct_io=False, trim=True),
    Case("direct-loop-mmap", "ext4-mmap"),
    Case("raw", "raw"),
    Case("mmap", "mmap"),
    Case("whole-machine", "ext4", in_cgroup=False),
    Case("whole-machine-buffered-loop", "ext4", in_cgroup=False, direct_io=False),
    Case("whole-machine-raw", "raw", in_cgroup=False),
)


@dataclass(slots=True)
class Result:
    """The outcome of a case.

    Attributes:
        written: Bytes that the writer wrote.
        seconds: How long it wrote, without the last fsync.
        gap: The longest time between two steps, in seconds.
        fsync: How long the last fsync took, in seconds; -1 if it did not end.
        oom_kills: The number of processes that the OOM killer ended.
        faults: What is wrong.
    """

    written: int
    seconds: float
    gap: float
    fsync: float
    oom_kills: int
    faults: list[str]


def pattern(step: int) -> bytes:
    """Return the bytes that step number ``step`` writes."""
    return step.to_bytes(8, "little") * (STEP_BYTES // 8)


def write(path: Path, most: int, seconds: float, *, mapped: bool) -> None:
    """Write up to ``most`` bytes for up to ``seconds``; report each step on stdout."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if os.fstat(fd).st_size < most:
        os.truncate(fd, most)
    view = mmap.mmap(fd, most) if mapped else None
    end = time.monotonic() + seconds
    for step in range(most // STEP_BYTES):
        if time.monotonic() > end:
            break
        if view is None:
            os.pwrite(fd, pattern(step), step * STEP_BYTES)
        else:
            view[step * STEP_BYTES : (step + 1) * STEP_BYTES] = pattern(step)
        print("step", flush=True)
    print("fsync", flush=True)
    if view is not None:
        view.flush()
    os.fsync(fd)
    print("end", flush=True)


def trim() -> None:
    """Delete files and trim, until killed."""
    for number in range(1 << 30):
        path = _FILES / "deleted"
        path.write_bytes(pattern(number) * 4)
        path.unlink()
        subprocess.run(["fstrim", _FILES], check=True, stdout=subprocess.DEVNULL)


def run(*command: str | Path) -> str:
    """Run a command, which must succeed; return its output."""
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=COMMAND_TIMEOUT_SECONDS
    ).stdout


def in_group(case: Case, *command: str | Path, drop: bool = False) -> list[str]:
    """Return the command that runs ``command`` in the case's memory cgroup."""
    words = [str(word) for word in command]
    if drop:
        words = ["setpriv", "--bounding-set", "-sys_resource", *words]
    if case.in_cgroup:
        words = ["sh", "-c", f'echo $$ >{_CGROUP}/cgroup.procs; exec "$@"', "sh", *words]
    return words


def this(*arguments: str | Path) -> list[str]:
    """Return the command that runs a part of this program."""
    return [sys.executable, __file__, *(str(argument) for argument in arguments)]


def measure(case: Case, path: Path, most: int, seconds: float) -> Result:
    """Run the writer of a case and measure its steps."""
    words = this("--write", path, "--mib", str(most >> 20), "--seconds", str(seconds))
    if "mmap" in case.writer:
        words.append("--mapped")
    result = Result(0, 0.0, 0.0, -1.0, 0, [])
    with subprocess.Popen(
        in_group(case, *words), stdout=subprocess.PIPE, text=True
    ) as writer, ExitStack() as stack:  # fmt: skip
        assert writer.stdout is not None
        if case.trim:
            trimmer = subprocess.Popen(in_group(case, *this("--trim")))
            stack.callback(trimmer.wait)
            stack.callback(trimmer.kill)
        begin = last = time.monotonic()
        for line in writer.stdout:
            now = time.monotonic()
            if line == "end\n":
                result.fsync = now - last
                break
            result.gap = max(result.gap, now - last)
            result.seconds = now - begin
            result.written += STEP_BYTES * (line == "step\n")
            last = now
    if writer.returncode:
        result.faults.append(f"writer: exit code {writer.returncode}")
    return result


def verify(path: Path, written: int, result: Result) -> None:
    """Compare the data with what the steps wrote."""
    with path.open("rb") as file:
        for step in range(written // STEP_BYTES):
            if file.read(STEP_BYTES) != pattern(step):
                result.faults.append(f"data: step {step} is not what was written")
                return


def oom_kills(case: Case) -> int:
    """Return how many processes the OOM killer has ended."""
    text = (_CGROUP / "memory.events" if case.in_cgroup else Path("/proc/vmstat")).read_text()
    return sum(int(line.split()[1]) for line in text.split("\n") if line.startswith("oom_kill "))


def check(command: list[str | Path], result: Result) -> None:
    """Run a check, which must find no error; leaked clusters are none."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in ((0, 3) if "check" in command else (0,)):
        result.faults.append(f"{command[0]}: {done.returncode}: {done.stdout[-300:]}")


def run_case(case: Case, most: int, seconds: float) -> Result:
    """Make an image, write to it under pressure, and check image and data."""
    run("rm", "-rf", _WORK)
    _MOUNTPOINT.mkdir(parents=True)
    _FILES.mkdir()
    run("qedimg", "create", _IMAGE, str(DISK_BYTES))
    if case.in_cgroup:
        _CGROUP.mkdir(exist_ok=True)
        (_CGROUP / "memory.max").write_text(str(CGROUP_BYTES))
    before = oom_kills(case)
    pidfile = _WORK / "pid"
    mount = ("qedfuse", _IMAGE, _MOUNTPOINT, "--pidfile", pidfile)
    run(*in_group(case, *mount, drop=not case.flag))
    server = int(pidfile.read_text())
    device, path = "", _RAW
    if case.writer.startswith("ext4"):
        words = ("losetup", "--find", "--show", f"--direct-io={'on' if case.direct_io else 'off'}")
        device, path = run(*words, _RAW).strip(), _FILES / "file"
        run("mkfs.ext4", "-q", device)
        run("mount", device, _FILES)
    run("sync")
    result = measure(case, path, most, seconds)
    if not Path(f"/proc/{server}").exists():
        result.faults.append("the server has ended")
        return result
    if device:
        run("umount", _FILES)
        run("losetup", "--detach", device)
    run("qedfuse", "umount", _MOUNTPOINT)
    result.oom_kills = oom_kills(case) - before
    if result.gap > LONGEST_GAP_SECONDS:
        result.faults.append(f"a gap of {result.gap:.1f} s")
    check_case(device != "", path, result)
    return result


def check_case(has_files: bool, path: Path, result: Result) -> None:  # noqa: FBT001
    """Check the image, the file system in it, and the data."""
    check(["qedimg", "check", _IMAGE], result)
    check(["qemu-img", "check", "-f", "qed", _IMAGE], result)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    run("qedfuse", "-r", _IMAGE, _MOUNTPOINT)
    if has_files:
        device = run("losetup", "--find", "--show", "--read-only", _RAW).strip()
        check(["e2fsck", "-f", "-n", device], result)
        run("mount", "-o", "ro,noload", device, _FILES)
        verify(path, result.written, result)
        run("umount", _FILES)
        run("losetup", "--detach", device)
    else:
        verify(path, result.written, result)
    run("qedfuse", "umount", _MOUNTPOINT)


def main() -> int:
    """Run the cases that are named, or all; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", help="names of cases (all)")
    parser.add_argument("--mib", type=int, default=600, help="the most that is written, in MiB")
    parser.add_argument("--seconds", type=float, default=60, help="the longest time of writing")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mapped", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trim", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(given.write, given.mib << 20, given.seconds, mapped=given.mapped)
        return 0
    if given.trim:
        trim()
    print("| case | MB | seconds | longest gap | fsync | OOM kills | faults |", flush=True)
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    bad = 0
    for case in CASES:
        if given.cases and case.name not in given.cases:
            continue
        result = run_case(case, given.mib << 20, given.seconds)
        bad += bool(result.faults)
        print(
            f"| {case.name} | {result.written / 1e6:.0f} | {result.seconds:.0f} "
            f"| {result.gap:.1f} s | {result.fsync:.1f} s | {result.oom_kills} "
            f"| {'; '.join(result.faults) or 'none'} |",
            flush=True,
        )
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
