"""Standard streams that can be used even if the program was started with some of them closed."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Final, TextIO

from qedfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NULL_FLAGS: Final = (os.O_WRONLY, os.O_RDONLY, os.O_RDWR)
"""How `open_streams` opens /dev/null in place of descriptors 0, 1 and 2, if they are closed."""


def open_streams() -> None:
    """Make sure that descriptors 0 to 2, ``sys.stdout`` and ``sys.stderr`` are open.

    The caller must call this function before it opens any file.  If descriptor 1 is closed, a later
    open(2) can return the number 1.  If the opened file were an image, each ``print`` would
    overwrite the image.  Therefore /dev/null takes the place of each closed descriptor.  It is
    opened so that reads of standard input and writes to standard output still fail.  Messages to
    standard error are lost.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, _NULL_FLAGS[descriptor])
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            # Child processes need descriptors 0 to 2 too, so they must inherit this one.
            os.set_inheritable(descriptor, True)  # noqa: FBT003
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A file name can have characters that the encoding of the stream lacks.
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Turn the error of a write to ``sys.stdout``, except BrokenPipeError, into a HostError.

    Every OSError in the block counts as such an error.

    Raises:
        BrokenPipeError: The reader of stdout has gone; the caller must call `discard_unwritten`.
        HostError: stdout cannot be written to for another reason.  The unwritten text was dropped.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_unwritten(sys.stdout)
        msg = f"standard output: {error.strerror}"
        raise HostError(msg) from error


def discard_unwritten(stream: TextIO) -> None:
    """Send the text that ``stream`` could not write, and all later output, to /dev/null.

    Otherwise the interpreter would try to write the text again when it exits, and print an error.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    with suppress(OSError):
        stream.flush()
