"""The file that a new one is going to replace: nobody may lose it who has not said so."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError, cannot_open
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.regular import KINDS, open_regular
from qedfuse.text import printable

if TYPE_CHECKING:
    from contextlib import ExitStack


def lock_replaced_file(
    path: str, stack: ExitStack, *, overwrite: bool, in_place: bool = False
) -> int | None:
    """Lock the file that is about to be replaced until ``stack`` ends; return its descriptor.

    Returns None if there is no such file.

    Args:
        path: Its name.
        stack: Lets it go.
        overwrite: Whether it is to be replaced.
        in_place: Whether the command can also write into what is there, by ``-n``.

    Raises:
        UsageError: It is not to be replaced, or with ``in_place`` is no regular file.
        ImageError: It is not a regular file.
        ImageInUseError: Somebody has it open as an image.
    """
    if not os.path.lexists(path):
        return None
    if in_place:
        _refuse_special(path)
    if not overwrite:
        hint = ", -n writes into it" if in_place else ""
        msg = f"{printable(path)}: exists already (--force replaces it{hint})"
        raise UsageError(msg)
    fd = open_regular(path, os.O_RDONLY)
    stack.callback(os.close, fd)
    lock_image(fd, LockMode.WRITE, printable(path))
    return fd


def _refuse_special(path: str) -> None:
    """Refuse what can be written into at most, also where it would be replaced."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  a name, not a Path
    except OSError as error:
        raise cannot_open(path, error) from error
    if not stat.S_ISREG(mode):
        found = KINDS.get(stat.S_IFMT(mode), "a special file")
        hint = " (-n writes into it)" if stat.S_ISBLK(mode) else ""
        msg = f"{printable(path)}: found {found}, expected a new file{hint}"
        raise UsageError(msg)
