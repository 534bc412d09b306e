"""What the program prints, so that whatever its streams are attached to, it ends as it should."""

from __future__ import annotations

import sys
from typing import Final

from qedfuse.cli.streams import forget
from qedfuse.text import printable

BROKEN_PIPE: Final = 141
"""What a shell shows for a program that SIGPIPE ended."""
_FAILED: Final = 1


def complain(message: str) -> None:
    """Print a line to stderr; where nobody listens, the exit code still tells."""
    try:
        sys.stderr.write(f"qedimg: {printable(message)}\n")
        sys.stderr.flush()
    except OSError:
        forget(sys.stderr)


def finish_output(code: int, failed: int = _FAILED) -> int:
    """Bring what was printed to where it goes; give the exit code, ``failed`` if it cannot be."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        forget(sys.stdout)
        return code or BROKEN_PIPE
    except OSError as error:
        return output_failed(error, code or failed)
    return code


def output_failed(error: OSError, code: int) -> int:
    """Complain, once, that something could not be printed; give the exit code."""
    forget(sys.stdout)
    complain(f"standard output: {error.strerror or error}")
    return code
