"""What to say when the working directory has been removed."""

from __future__ import annotations

import errno
import os
from typing import Final

REMOVED: Final = "the working directory has been removed: expected absolute names"


def is_removed() -> bool:
    """Tell whether the working directory has been removed."""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return True
    return False


def asked_for_removed(error: BaseException) -> bool:
    """Tell whether an exception says that the working directory has no name any more."""
    return (
        isinstance(error, OSError)
        and error.errno == errno.ENOENT
        and error.filename is None
        and is_removed()
    )
