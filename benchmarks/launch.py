"""Run a program, and print its run time and its peak memory.

    python -m benchmarks.launch PROGRAM ARGUMENT...

The kernel counts the memory that a process had before execve(2) as the new program's, so a
large process cannot measure a small program.  This module is small, and imports little.
"""

from __future__ import annotations

import os
import sys
import time


def launch(command: list[str]) -> tuple[float, float, int, int]:
    """Run a program with its output discarded.

    Returns its run time and its CPU time in seconds, its peak memory in bytes, and its exit
    code.
    """
    began = time.perf_counter()
    discard = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=discard)
    _pid, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    busy = usage.ru_utime + usage.ru_stime
    return seconds, busy, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    print(*launch(sys.argv[1:]))
