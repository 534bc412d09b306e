"""Run external programs with a time limit.

A process that uses the disk of a server that hangs is blocked in the kernel.  Therefore the
benchmarks never access a disk themselves: `run` starts a program, and abandons it after a
timeout; ending the server then unblocks the program.
"""

from __future__ import annotations

import os
import signal
import subprocess


class BenchmarkError(Exception):
    """A measurement failed; the message is one line that says what and where."""


class WrongDataError(BenchmarkError):
    """A disk has other content than was written to it."""


def run(*command: str, seconds: float = 60.0, text: str = "") -> str:
    """Run a program with ``text`` as its input, and return its output.

    Raises:
        BenchmarkError: The program failed, or did not end within ``seconds`` and was killed.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(text, timeout=seconds)
    except BaseException as error:
        # No wait here, because the program may be blocked in the kernel until the server ends.
        os.killpg(child.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            msg = f"{command[0]}: found no end after {seconds:.0f} s"
            raise BenchmarkError(msg) from None
        raise
    if child.returncode:
        text = errors.strip() or output.strip() or "no output"
        # The last line that is not indented; indented lines only add advice.
        line = [line for line in text.splitlines() if line[:1].strip()][-1]
        msg = f"{command[0]}: exit code {child.returncode}: {line}"
        raise BenchmarkError(msg)
    return output
