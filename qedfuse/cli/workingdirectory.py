"""Recognising that a failure is due to a working directory that has been removed."""

from __future__ import annotations

import errno
import os
from typing import Final

REMOVED: Final = "the working directory has been removed: expected absolute names"
"""A message for the user; qedimg also appends it to a message about a missing file."""


def is_removed() -> bool:
    """Return whether the working directory of this process has been removed."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return True
    return False


def is_caused_by_removal(error: BaseException) -> bool:
    """Return whether ``error`` is a failure of getcwd(2) in a removed directory."""
    return (
        isinstance(error, OSError)
        and error.errno == errno.ENOENT
        and error.filename is None
        and is_removed()
    )
