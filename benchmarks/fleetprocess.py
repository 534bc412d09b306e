"""The processes with the machines of a fleet; see `benchmarks.fleetmachine`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.commands import BenchmarkError, WrongDataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SECONDS: Final = 1200.0


def receive(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Wait until each process has printed a line or has ended."""
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()


def send(processes: Iterable[subprocess.Popen[str]]) -> None:
    """Send a line to each process."""
    for process in processes:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # `finish` reports why it has ended
            process.stdin.write("go\n")
            process.stdin.flush()


def finish(process: subprocess.Popen[str], name: str) -> None:
    """Wait for the machines of a process, which read from the server ``name``.

    Raises:
        WrongDataError: A machine has read a wrong byte.
        BenchmarkError: A machine could not read.
    """
    try:
        output, _ = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        msg = f"{name}: found machines that still read after {_SECONDS:.0f} s"
        raise BenchmarkError(msg) from None
    if process.returncode:
        kind = WrongDataError if "wrong" in output else BenchmarkError
        msg = f"{name}: {output.strip() or 'a process of machines failed'}"
        raise kind(msg)


def started(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a process with some machines."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fleetmachine", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )
