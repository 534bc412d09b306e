"""Following the names of bases from an image down, without opening the chain for use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backing import MAX_DEPTH
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.errors import QedError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.formats import is_qed
from qedfuse.ondisk.header import parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator


def chain_paths(image: str, directory: str = "") -> Iterator[str]:
    """List the paths of the bases of an image, from the first down.

    Only names are followed, as far as they lead to images: whether the bases may be used,
    or are there at all, is not asked.  A loop is followed `MAX_DEPTH` files far.
    Names after ``file:`` begin at ``directory``; empty is the working directory.
    """
    path = image
    for _ in range(MAX_DEPTH + 1):
        name, is_last = _base_of(path)
        if not name:
            return
        path = backing_path(path, name, directory)
        yield path
        if is_last:
            return


def _base_of(path: str) -> tuple[str, bool]:
    """Return the name of an image's base, and whether it is raw and has none itself.

    The name is empty if the image has no base, or is no image that can be read.
    """
    try:
        fd = open_regular(path, os.O_RDONLY)
    except (OSError, QedError):
        return "", True
    try:
        start = os.pread(fd, HEADER_BYTES, 0)
        if not is_qed(start):
            return "", True
        header = parse_header(start, path)
        if not header.has_backing:
            return "", True
        raw = os.pread(fd, header.backing_filename_size, header.backing_filename_offset)
        return os.fsdecode(raw) if b"\0" not in raw else "", header.backing_is_raw
    except (OSError, QedError):
        return "", True
    finally:
        os.close(fd)
