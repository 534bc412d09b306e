"""The names of backing files: the paths that they stand for, and the paths of a whole chain."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qedfuse.errors import QedError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.formats import is_qed
from qedfuse.ondisk.header import parse_header
from qedfuse.remote.address import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CHAIN_DEPTH: Final = 64
"""Maximum number of backing files in a chain."""

_FILE: Final = "file:"
"""QEMU's protocol for files: the rest of the name is a path, which may contain colons."""


def has_protocol(name: bytes) -> bool:
    """Return whether a name begins, as QEMU reads names, with a protocol other than ``file:``."""
    return b":" in name.split(b"/", 1)[0] and not name.startswith(os.fsencode(_FILE))


def lacks_path(name: bytes) -> bool:
    """Return whether a name is ``file:`` with no path after it."""
    return name == os.fsencode(_FILE)


def backing_path(image: str, name: str, directory: str = "") -> str:
    """Return the path or URL of the backing file that an image names, without any I/O.

    A relative name is relative to the directory of the image, even if the image is a URL.  A
    relative path after ``file:`` is relative to the working directory, as in QEMU.

    Args:
        image: The path or URL of the image.
        name: The name in the image: a plain path, a path after ``file:``, or a URL.
        directory: The working directory; empty for the working directory of the process.
    """
    if is_url(name):
        return name
    if name.startswith(_FILE):
        return os.path.join(directory, name.removeprefix(_FILE))  # noqa: PTH118  no I/O
    if is_url(image):
        image = image.partition("?")[0]
    return os.path.join(os.path.dirname(image), name)  # noqa: PTH118, PTH120  no I/O


def chain_paths(image: str, directory: str = "") -> Iterator[str]:
    """Yield the paths of the bases of an image, from the first down, by reading headers only.

    The chain ends with a file that is raw, has no base, cannot be read or parsed, or is a URL.  The
    last path may lead to no file.  At most `MAX_CHAIN_DEPTH` + 1 paths are yielded, even if the
    chain is a loop.

    Names after ``file:`` are relative to ``directory``, as for `backing_path`.
    """
    path = image
    for _ in range(MAX_CHAIN_DEPTH + 1):
        name, is_raw = _base_of(path)
        if not name:
            return
        path = backing_path(path, name, directory)
        yield path
        if is_raw:
            return


def _base_of(path: str) -> tuple[str, bool]:
    """Return the name of an image's base, and whether the header says that the base is raw.

    The name is empty if there is none, or if the file cannot be used.
    """
    if is_url(path):  # a URL is not opened here
        return "", True
    try:
        fd = open_regular(path, os.O_RDONLY)
    except (OSError, QedError):
        return "", True
    try:
        header_bytes = os.pread(fd, HEADER_BYTES, 0)
        if not is_qed(header_bytes):
            return "", True
        header = parse_header(header_bytes, path)
        if not header.has_backing:
            return "", True
        raw = os.pread(fd, header.backing_filename_size, header.backing_filename_offset)
        return os.fsdecode(raw) if b"\0" not in raw else "", header.backing_is_raw
    except (OSError, QedError):
        return "", True
    finally:
        os.close(fd)
