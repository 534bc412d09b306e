"""A working directory that has been removed, as the cause of a failure."""

from __future__ import annotations

import errno
import os
from typing import Final

REMOVED: Final = "the working directory has been removed: expected absolute names"
"""The message for the user."""


def is_removed() -> bool:
    """Return whether the working directory of this process has been removed."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return True
    return False


def is_caused_by_removal(error: BaseException) -> bool:
    """Return whether ``error`` comes from getcwd(2) in a directory that has been removed."""
    return (
        isinstance(error, OSError)
        and error.errno == errno.ENOENT
        and error.filename is None
        and is_removed()
    )
