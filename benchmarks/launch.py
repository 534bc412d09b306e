"""Runs one program and tells how long it took and the most memory it had.

    python -m benchmarks.launch PROGRAM ARGUMENT...

What a process had before it became another program counts as the other one's, so that a
large program cannot measure a small one.  This one is small, and imports little.
"""

from __future__ import annotations

import os
import sys
import time


def launch(command: list[str]) -> tuple[float, float, int, int]:
    """Run a program with its output thrown away.

    Gives seconds, seconds of CPU time, bytes of memory at the most, and the exit code.
    """
    began = time.perf_counter()
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=nowhere)
    _pid, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - began
    busy = usage.ru_utime + usage.ru_stime
    return seconds, busy, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    print(*launch(sys.argv[1:]))
