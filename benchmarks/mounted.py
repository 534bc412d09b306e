"""A disk mounted as users do it, and what the process that serves it takes up.

Like `benchmarks.servers` nothing here touches the disk itself, so that a server that
hangs does not take the measurement with it.
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

from benchmarks.servers import BenchmarkError, run

if TYPE_CHECKING:
    from types import TracebackType

STOP_SECONDS: Final = 120.0
IDLE_SECONDS: Final = 0.4
"""Without any work for so long a process counts as idle; CPU time comes in steps of 10 ms."""
_KIB: Final = 1024


class Usage(NamedTuple):
    """What a process takes up now: memory in bytes, the most so far, descriptors, threads."""

    resident: int
    peak: int
    descriptors: int
    threads: int


def usage(pid: int) -> Usage:
    """Look at a process.

    Raises:
        BenchmarkError: It has ended.
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


def cpu_seconds(pid: int) -> float:
    """Give how long a process has been at work.

    Raises:
        BenchmarkError: It has ended.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        msg = f"process {pid}: the server has ended by itself"
        raise BenchmarkError(msg) from None
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(pid: int, most: float = 120.0) -> None:
    """Return when a process has nothing more to do.

    Raises:
        BenchmarkError: It has ended, or is at work for longer than ``most`` seconds.
    """
    end = time.monotonic() + most
    before = cpu_seconds(pid)
    while time.monotonic() < end:
        time.sleep(IDLE_SECONDS)
        now = cpu_seconds(pid)
        if now == before:
            return
        before = now
    msg = f"process {pid}: at work for {most:.0f} s, expected it to be idle"
    raise BenchmarkError(msg)


class Mounted:
    """An image mounted by the command qedfuse, from ``with`` on.

    Attributes:
        disk: The flat file.
        pid: The process that serves it.
        start_seconds: What the command took until it returned.
    """

    def __init__(self, qedfuse: str, image: Path, mountpoint: Path, *options: str) -> None:
        """Prepare; ``mountpoint`` is made, and taken away at the end."""
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
        """Unmount; give the seconds until the command has returned and the process is gone.

        Raises:
            BenchmarkError: The command failed, or has left the process behind.
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
        """End a process that is still there, and take the mountpoint away."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(BenchmarkError):
                run("fusermount3", "-u", "-z", str(self._mountpoint), seconds=10)
        with suppress(OSError):
            self._mountpoint.rmdir()


def _runs(pid: int) -> bool:
    """Tell whether a process is there and more than an exit code that nobody collects."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return False
    return state[0] != "Z"


def program() -> str:
    """Give the command to measure: the one beside this Python, unless QEDFUSE names one."""
    return os.environ.get("QEDFUSE") or str(Path(sys.executable).with_name("qedfuse"))
