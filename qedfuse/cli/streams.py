"""The standard streams of a program, whatever it was started with."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Final, TextIO

_STAND_IN_FLAGS: Final = (os.O_WRONLY, os.O_RDONLY, os.O_RDWR)
"""How /dev/null is opened in place of standard input, output and error."""


def make_streams() -> None:
    """Make streams of what the program was started with; call it before anything else.

    Where a standard descriptor is closed, the next file that is opened would get its
    number: an image would be written to whenever something is printed, and a connection be
    taken for standard input.  /dev/null takes the place of the missing one.  Reading from
    it and printing to it fail as before, so that lost output is noticed; only messages go
    nowhere, since the exit code tells as well.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, _STAND_IN_FLAGS[number])
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            # Programs that are started expect to have it as well.
            os.set_inheritable(number, True)  # noqa: FBT003
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A name may hold what the terminal's encoding has no character for.
            stream.reconfigure(errors="backslashreplace")


def forget(stream: TextIO) -> None:
    """Drop what could not be printed, or Python would try once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    with suppress(OSError):
        stream.flush()
