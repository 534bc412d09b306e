"""A disk mounted by the command, and the resources that its process uses.

As `benchmarks.commands` explains, no code here accesses the disk itself, so that a server
that hangs does not block the measurement.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from benchmarks.commands import BenchmarkError, run
from benchmarks.cputime import cpu_time

if TYPE_CHECKING:
    from types import TracebackType

STOP_SECONDS: Final = 120.0
IDLE_SECONDS: Final = 0.4
"""A process that uses no CPU time for this long is idle; CPU time has a resolution of 10 ms."""
_KIB: Final = 1024


class Usage(NamedTuple):
    """The resources of a process: memory and peak memory in bytes, descriptors, threads."""

    resident: int
    peak: int
    descriptors: int
    threads: int


def usage(pid: int) -> Usage:
    """Return the resources that a process uses.

    Raises:
        BenchmarkError: The process has ended.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        status, descriptors = "", 0
    found = dict(re.findall(r"^(VmRSS|VmHWM|Threads):\s*(\d+)", status, re.MULTILINE))
    if len(found) < 3:  # noqa: PLR2004  of a zombie only the threads are left
        msg = f"process {pid}: the server has ended by itself"
        raise BenchmarkError(msg)
    return Usage(
        int(found["VmRSS"]) * _KIB,
        int(found["VmHWM"]) * _KIB,
        descriptors,
        int(found["Threads"]),
    )


def wait_until_idle(pid: int, timeout_seconds: float = 120.0) -> None:
    """Return when a process uses no CPU time any more.

    Raises:
        BenchmarkError: The process has ended, or is still busy after ``timeout_seconds``.
    """
    end = time.monotonic() + timeout_seconds
    before = cpu_time(pid)
    while time.monotonic() < end:
        time.sleep(IDLE_SECONDS)
        now = cpu_time(pid)
        if now == before:
            return
        before = now
    msg = f"process {pid}: busy for {timeout_seconds:.0f} s, expected it to be idle"
    raise BenchmarkError(msg)


class Mounted:
    """An image that the command qedfuse mounts, as a context manager.

    Attributes:
        disk: The flat file.
        pid: The process that serves it; 0 if it is not mounted.
        start_seconds: How long the command took to return.
    """

    def __init__(self, qedfuse: str, image: Path, mountpoint: Path, *options: str) -> None:
        """Prepare a mount; ``mountpoint`` is created, and removed at the end."""
        self._options = options
        self._qedfuse = qedfuse
        self._image = image
        self._mountpoint = mountpoint
        self.disk: Final = mountpoint / f"{image.stem}.raw"
        self.pid = 0
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        """Mount.

        Raises:
            BenchmarkError: The command failed.
        """
        self._mountpoint.mkdir(exist_ok=True)
        pidfile = self._mountpoint.with_suffix(".pid")
        command = (self._qedfuse, str(self._image), str(self._mountpoint))
        began = time.monotonic()
        run(*command, *self._options, "--pidfile", str(pidfile))
        self.start_seconds = time.monotonic() - began
        self.pid = int(pidfile.read_text(encoding="ascii"))
        return self

    def stop(self) -> float:
        """Unmount; return the seconds until the command has returned and the process has ended.

        Raises:
            BenchmarkError: The command failed, or the process is still there.
        """
        began = time.monotonic()
        run(self._qedfuse, "umount", str(self._mountpoint), seconds=STOP_SECONDS)
        while _runs(self.pid):
            if time.monotonic() - began > STOP_SECONDS:
                msg = f"process {self.pid}: still there after it was unmounted"
                raise BenchmarkError(msg)
            time.sleep(0.001)
        passed = time.monotonic() - began
        self.pid = 0
        return passed

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill the process if it is still there, and remove the mountpoint."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(BenchmarkError):
                run("fusermount3", "-u", "-z", str(self._mountpoint), seconds=10)
        with suppress(OSError):
            self._mountpoint.rmdir()


def _runs(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return False
    return state[0] != "Z"


def program() -> str:
    """Return the command to measure: QEDFUSE, or by default the one beside this Python."""
    return os.environ.get("QEDFUSE") or str(Path(sys.executable).with_name("qedfuse"))
