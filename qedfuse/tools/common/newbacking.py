"""Checks of a backing file before its name is written into an image.

This module has no asynchronous functions and imports neither trio nor numpy, because loading
them takes longer than creating an image.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backingpath import backing_path, chain_paths
from qedfuse.errors import BackingError, QedError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import HEADER_BYTES
from qedfuse.ondisk.formats import is_qed
from qedfuse.ondisk.header import parse_header
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.tools.common.formatprobe import ImageFormat


def refuse_backing_loop(image: str, backing: str, directory: str = "") -> None:
    """Refuse a backing file that is the image itself, or in whose chain the image is.

    The chain is followed by the names in the headers, as `chain_paths` does.  Whether the files
    of the chain can be used as backing files is not tested.

    Args:
        image: The file that will name the backing file; this file need not exist.
        backing: Name of the backing file, see `backing_path`.
        directory: The working directory, as for `backing_path`.

    Raises:
        BackingError: The image is the backing file, or is among the files of its chain.
    """
    about = f"{printable(image)}: backing file"
    path = backing_path(image, backing, directory)
    if _is_same_file(path, image):
        msg = f"{about} {printable(path)}: found the image itself"
        raise BackingError(msg)
    for below in chain_paths(path, directory):
        if _is_same_file(below, image):
            msg = f"{about} {printable(below)}: found the image itself through "
            msg += printable(backing)
            raise BackingError(msg)


def size_and_format(
    image: str, backing: str, wanted: ImageFormat | None
) -> tuple[int, ImageFormat]:
    """Return the size of the disk in the backing file of a new image, and the file's format.

    The size is in bytes.  The backing file is not locked, so another program may be using it.

    Args:
        image: Path of the new image.
        backing: Name of the backing file, see `backing_path`.
        wanted: Format of the backing file; None accepts only QED.

    Raises:
        BackingError: The backing file is missing, cannot be read, is not QED although only QED
            is accepted, has an invalid header, or `refuse_backing_loop` refuses the file.
    """
    path = backing_path(image, backing)
    about, shown = f"{printable(image)}: backing file", printable(path)
    refuse_backing_loop(image, backing)
    try:
        fd = open_regular(path, os.O_RDONLY)
        try:
            start, size = os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size
        finally:
            os.close(fd)
        if wanted == "raw":
            return size, "raw"
        if is_qed(start):
            header = parse_header(start, shown)
            header.check_fits(size, shown)
            return header.image_size, "qed"
    except QedError as error:
        msg = f"{about} {error}"
        raise BackingError(msg) from error
    except OSError as error:
        msg = f"{about} {shown}: {error.strerror}"
        raise BackingError(msg) from error
    expected = "a QED image" if wanted else "a QED image, or -F raw for any other content"
    msg = f"{about} {shown}: found no QED magic, expected {expected}"
    raise BackingError(msg)


def _is_same_file(first: str, second: str) -> bool:
    """Return whether two paths lead to the same file; neither need exist yet."""
    return os.path.realpath(first) == os.path.realpath(second) or (
        os.path.exists(first)  # noqa: PTH110
        and os.path.exists(second)  # noqa: PTH110
        and os.path.samefile(first, second)  # noqa: PTH121
    )
