"""Opening and locking an existing file before a new file replaces it, if the user permits that."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError, cannot_open
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.regular import KIND_NAMES, open_regular
from qedfuse.text import printable

if TYPE_CHECKING:
    from contextlib import ExitStack


def lock_replaced_file(
    path: str, stack: ExitStack, *, overwrite: bool, offers_in_place: bool = False
) -> int | None:
    """Open and lock a file that will be replaced; return its descriptor; None if it does not exist.

    Args:
        path: The name of the file.
        stack: Closes the descriptor at its end; the close releases the lock.
        overwrite: Whether the user has agreed to replace the file.
        offers_in_place: Whether the command can also write into an existing file with ``-n``.

    Raises:
        UsageError: The file exists, and ``overwrite`` is False; or it is not a regular file, and
            ``offers_in_place`` is True.
        ImageError: The file is not a regular file, and ``offers_in_place`` is False.
        ImageInUseError: Another process has the file open as an image.
        HostError: The file cannot be opened or locked.
    """
    if not os.path.lexists(path):
        return None
    if offers_in_place:
        _refuse_special(path)
    if not overwrite:
        hint = ", -n writes into it" if offers_in_place else ""
        msg = f"{printable(path)}: exists already (--force replaces it{hint})"
        raise UsageError(msg)
    fd = open_regular(path, os.O_RDONLY)
    stack.callback(os.close, fd)
    lock_image(fd, LockMode.WRITE, printable(path))
    return fd


def _refuse_special(path: str) -> None:
    """Raise UsageError if a file is not a regular file: such a file cannot be replaced."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  a name, not a Path
    except OSError as error:
        raise cannot_open(path, error) from error
    if not stat.S_ISREG(mode):
        found = KIND_NAMES.get(stat.S_IFMT(mode), "a special file")
        hint = " (-n writes into the device)" if stat.S_ISBLK(mode) else ""
        msg = f"{printable(path)}: found {found}, expected a new file{hint}"
        raise UsageError(msg)
