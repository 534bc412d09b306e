"""Opening an image for a tool that changes its disk."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from qedfuse.check.inspector import inspect_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from qedfuse.disk.disk import Disk


def damaged_error(disk: Disk, outcome: str) -> CorruptImageError:
    """Return the error of a tool that damaged tables have kept from its work.

    ``outcome`` says what has not been done.
    """
    msg = (
        f"{disk.name}: {outcome}: found damaged tables; repair them first: "
        f"qedimg check -r all {shlex.quote(disk.name)}"
    )
    return CorruptImageError(msg)


def open_writable(
    path: str, options: OpenOptions | None = None, *, with_bases: bool = True
) -> AbstractAsyncContextManager[Disk]:
    """Return a context manager that opens an image for writing.

    Entering it checks the image first if NEED_CHECK is set, or if the length of the file is not a
    multiple of the cluster size.  The errors are raised on entering and leaving.

    Args:
        path: The image.
        options: How to open the image; ``writable`` is always set.  None for the defaults.
        with_bases: Whether to open the bases, see `open_disk`.

    Raises:
        CorruptImageError: The check found damage.
        NeedsCheckError: The image is too large to be checked.
        QedError: The image or a base cannot be opened or locked, ``options.backing`` refuses a
            base, or the changes could not be made durable.
    """
    options = replace(options or OpenOptions(), writable=True)
    return open_disk(path, options, inspector=inspect_image, with_bases=with_bases)
