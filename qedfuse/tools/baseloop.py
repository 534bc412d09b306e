"""Refusing an image that would be its own base, be it by way of others."""

from __future__ import annotations

import os
from typing import Final

from qedfuse.errors import BackingError, QedError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.formats import is_qed
from qedfuse.ondisk.header import parse_header
from qedfuse.util.text import printable

_MOST: Final = 64
"""Bases that a chain may have."""


def refuse_loop(image: str, backing: str) -> None:
    """Look for a file that is about to be replaced among the bases it is to have.

    Only names are followed, as far as they lead to files: whether the bases are any good
    is not asked here.

    Args:
        image: The file; it need not be there.
        backing: Its base, by a name that is absolute or begins at the image's directory.

    Raises:
        BackingError: It is among them.
    """
    about = f"{printable(image)}: backing file"
    path = os.path.join(os.path.dirname(image), backing)  # noqa: PTH118, PTH120  no I/O
    for depth in range(_MOST):
        if _same(path, image):
            by_way = "" if not depth else f" by way of {printable(backing)}"
            msg = f"{about} {printable(path)}: found the image itself{by_way}"
            raise BackingError(msg)
        name = _base_of(path)
        if not name:
            return
        path = os.path.join(os.path.dirname(path), name)  # noqa: PTH118, PTH120  no I/O


def _base_of(path: str) -> str:
    """Give the name of an image's base; an empty one if it has none, or is no image."""
    try:
        fd = open_regular(path, os.O_RDONLY)
    except (OSError, QedError):
        return ""
    try:
        start = os.pread(fd, HEADER_BYTES, 0)
        if not is_qed(start):
            return ""
        header = parse_header(start, path)
        if not header.has_backing:
            return ""
        raw = os.pread(fd, header.backing_filename_size, header.backing_filename_offset)
        return os.fsdecode(raw) if b"\0" not in raw else ""
    except (OSError, QedError):
        return ""
    finally:
        os.close(fd)


def _same(first: str, second: str) -> bool:
    """Tell whether two names lead to one file, which need not be there yet."""
    return os.path.realpath(first) == os.path.realpath(second) or (
        os.path.exists(first)  # noqa: PTH110
        and os.path.exists(second)  # noqa: PTH110
        and os.path.samefile(first, second)  # noqa: PTH121
    )
