"""The CPU time of a process: user and system, without that of its children."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple, Self

from benchmarks.commands import BenchmarkError

_USER_FIELD, _SYSTEM_FIELD = 11, 12
"""The indices of utime and stime after the process's name; see proc_pid_stat(5)."""
_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


class CpuTime(NamedTuple):
    """CPU time in seconds."""

    user: float = 0.0
    system: float = 0.0

    @property
    def total(self) -> float:
        """The sum of both."""
        return self.user + self.system

    def plus(self, other: CpuTime) -> Self:
        """Return the sum of two times."""
        return type(self)(self.user + other.user, self.system + other.system)

    def minus(self, other: CpuTime) -> Self:
        """Return the time that has passed since ``other``."""
        return type(self)(self.user - other.user, self.system - other.system)


def parse_stat(text: str) -> CpuTime:
    """Return the CPU time in the content of ``/proc/PID/stat``.

    The process's name, in parentheses, may contain spaces and parentheses itself.
    """
    fields = text.rpartition(")")[2].split()
    user, system = int(fields[_USER_FIELD]), int(fields[_SYSTEM_FIELD])
    return CpuTime(user / _TICKS_PER_SECOND, system / _TICKS_PER_SECOND)


def cpu_time(pid: int) -> CpuTime:
    """Return the CPU time of all threads of a process.

    Raises:
        BenchmarkError: The process has ended.
    """
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8"))
    except OSError:
        msg = f"process {pid}: the server has ended by itself"
        raise BenchmarkError(msg) from None
