"""What subcommands print: text that ``-q`` silences, tables, and JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def say(arguments: argparse.Namespace, text: str) -> None:
    """Print a line, unless ``-q`` was given."""
    if not arguments.quiet:
        sys.stdout.write(f"{text}\n")


def print_json(value: Any) -> None:  # noqa: ANN401  whatever JSON can say
    """Print a value as qemu-img prints its JSON; lone surrogates of names come out escaped."""
    import json  # noqa: PLC0415  a quick start

    sys.stdout.write(json.dumps(value, indent=4, ensure_ascii=True) + "\n")


def table(rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Lay out rows in columns; the first row is the heading, ``right`` the numeric columns."""
    texts = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        cells = [
            text.rjust(width) if number in right else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
