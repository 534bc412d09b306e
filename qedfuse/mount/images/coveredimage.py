"""Refusing a mountpoint that is an image: probably an argument is missing, or two are swapped."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from qedfuse.errors import MountpointError
from qedfuse.mount.system.mounttable import find_mount
from qedfuse.ondisk.formats import SIGNATURE_BYTES, image_format
from qedfuse.remote.address import is_url
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def refuse_image_as_mountpoint(mountpoint: str, sources: Sequence[str]) -> None:
    """Refuse a mountpoint that is an image, unless it is one of the sources.

    ``qedfuse a.qed b.qed`` would hide ``b.qed``, although the user probably wanted to mount both.
    A user who names the same image twice wants to mount the disk over its own image.

    Args:
        mountpoint: The path, absolute and free of symbolic links.
        sources: The paths and URLs of the sources, as the user gave them, but absolute.

    Raises:
        MountpointError: The mountpoint is an image, and not one of the sources.
        HostError: /proc is not mounted.
    """
    found = _image_format(mountpoint)
    local = [source for source in sources if not is_url(source)]
    if found is None or any(os.path.realpath(source) == mountpoint for source in local):
        return
    shown = printable(mountpoint)
    msg = f"mountpoint {shown}: found a {found} image, expected a directory or another file"
    if len(sources) == 1 and local and _is_mountpoint_like(local[0]):
        msg += f" (the image comes first: qedfuse {shown} {printable(local[0])})"
    else:
        msg += " (the last word is the mountpoint: qedfuse IMAGE... MOUNTPOINT; or add -o nonempty)"
    raise MountpointError(msg)


def _image_format(path: str) -> str | None:
    """Return the format of an image, from its first bytes; None for anything else.

    Returns None also if a mount covers the file, or if it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode) or find_mount(path) is not None:
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        start = os.pread(fd, SIGNATURE_BYTES, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    return image_format(start)


def _is_mountpoint_like(path: str) -> bool:
    """Return whether a source is an empty file or a directory without images, like a mountpoint."""
    try:
        status = os.stat(path)  # noqa: PTH116  str paths
        if not stat.S_ISDIR(status.st_mode):
            return not status.st_size
        names = os.listdir(path)  # noqa: PTH208  names
    except OSError:
        return False
    return not any(_image_format(os.path.join(path, name)) for name in names)  # noqa: PTH118
