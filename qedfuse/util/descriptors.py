"""File descriptors of this process: listing and closing them."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from qedfuse.errors import proc_missing

if TYPE_CHECKING:
    from collections.abc import Iterable

STANDARD = (0, 1, 2)
"""The descriptors of standard input, output and error."""


def open_descriptors() -> set[int]:
    """Return the open descriptors of this process.

    Raises:
        HostError: /proc is not mounted.
        OSError: /proc/self/fd cannot be listed for another reason.
    """
    try:
        names = os.listdir("/proc/self/fd")  # noqa: PTH208  numbers, not paths
    except FileNotFoundError as error:
        raise proc_missing() from error
    found = set()
    for number in map(int, names):
        # The descriptor with which listdir() has read the directory is closed now.
        with suppress(OSError):
            os.fstat(number)
            found.add(number)
    return found


def close_descriptors(descriptors: Iterable[int]) -> None:
    """Close descriptors; skip those that are closed already or that fail to close."""
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


def discard_standard_streams() -> None:
    """Replace standard input, output and error by /dev/null, to release a terminal or pipe.

    Raises:
        OSError: /dev/null cannot be opened.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in STANDARD:
        os.dup2(null, number)
    if null not in STANDARD:
        os.close(null)
