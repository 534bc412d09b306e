"""The program's standard streams, so that whatever they are attached to, it ends as it should."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Final, TextIO

from qedfuse.util.text import printable

BROKEN_PIPE: Final = 141
"""What a shell shows for a program that SIGPIPE ended."""
_FAILED: Final = 1


def make_streams() -> None:
    """Make streams of what the program was started with.

    Where a stream is closed, the next file that is opened would become it, and an image
    would be written to whenever something is printed.  What stands in for it can be read
    or written to as little, so that lost output is noticed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name may hold what the terminal's encoding has no character for.
            stream.reconfigure(errors="backslashreplace")


def complain(message: str) -> None:
    """Print a line to stderr; where nobody listens, the exit code still tells."""
    try:
        sys.stderr.write(f"qedimg: {printable(message)}\n")
        sys.stderr.flush()
    except OSError:
        _forget(sys.stderr)


def finish_output(code: int, failed: int = _FAILED) -> int:
    """Bring what was printed to where it goes; give the exit code, ``failed`` if it cannot be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(sys.stdout)
        return code or BROKEN_PIPE
    except OSError as error:
        return output_failed(error, code or failed)
    return code


def output_failed(error: OSError, code: int) -> int:
    """Complain, once, that something could not be printed; give the exit code."""
    _forget(sys.stdout)
    complain(f"standard output: {error.strerror or error}")
    return code


def _forget(stream: TextIO) -> None:
    """Let what cannot be printed go nowhere, or Python would try once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    with suppress(OSError):
        stream.flush()
