"""Output of subcommands to stdout and stderr, and the exit code if stdout cannot be written to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from qedfuse.cli.streams import discard_unwritten
from qedfuse.text import printable, without_queries

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

BROKEN_PIPE: Final = 141
"""The exit code that a shell shows for a program that was killed by SIGPIPE (128 + 13)."""
_FAILED: Final = 1
"""The exit code if stdout cannot be written to for another reason than a closed pipe."""


def print_line(arguments: argparse.Namespace, text: str) -> None:
    """Print a line to stdout, unless ``-q`` was given."""
    if not arguments.quiet:
        sys.stdout.write(f"{text}\n")


def print_json(value: Any) -> None:  # noqa: ANN401  any JSON value
    """Print a value as JSON in qemu-img's layout, in ASCII, even if ``-q`` was given."""
    import json  # noqa: PLC0415  imported late: text output must not load it

    sys.stdout.write(json.dumps(value, indent=4, ensure_ascii=True) + "\n")


def table(rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Return ``rows``, at least one, as lines of text in aligned columns.

    The columns whose indices are in ``right`` are aligned to the right.
    """
    texts = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        cells = [
            text.rjust(width) if index in right else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def print_error(message: str) -> None:
    """Print an error message to stderr, without the queries of URLs, which may be secrets.

    If stderr cannot be written to, further output to it is discarded.  Then only the exit code
    reports the error.
    """
    try:
        sys.stderr.write(f"qedimg: {without_queries(printable(message))}\n")
        sys.stderr.flush()
    except OSError:
        discard_unwritten(sys.stderr)


def finish_output(code: int, failed: int = _FAILED) -> int:
    """Flush stdout and return the exit code.

    Returns:
        ``code`` if everything was written or ``code`` is not 0.  Otherwise `BROKEN_PIPE` if the
        reader has closed the pipe, and ``failed`` after any other error.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_unwritten(sys.stdout)
        return code or BROKEN_PIPE
    except OSError as error:
        return output_failed(error, code or failed)
    return code


def output_failed(error: OSError, code: int) -> int:
    """Print why stdout cannot be written to, and discard further output; return ``code``."""
    discard_unwritten(sys.stdout)
    print_error(f"standard output: {error.strerror or error}")
    return code
