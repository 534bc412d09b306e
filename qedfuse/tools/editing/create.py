"""Making a new image: its base looked at, its name taken only when it is complete.

Nothing here waits for long, so nothing is asynchronous but `preallocate`; a script that
makes images by the dozen does not want to wait for an event loop to be loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.disk.creation.create import make_image
from qedfuse.disk.creation.newheader import new_header
from qedfuse.disk.lookup.backingpath import backing_path
from qedfuse.errors import BackingError, QedError, UsageError
from qedfuse.hostio.regular import open_regular
from qedfuse.ondisk.constants import (
    DEFAULT_CLUSTER_SIZE,
    DEFAULT_TABLE_SIZE,
    HEADER_BYTES,
)
from qedfuse.ondisk.formats import is_qed
from qedfuse.ondisk.header import parse_header
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import refuse_backing_loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    Progress = Callable[[int, int], None]

_ALLOCATION_CHUNK_BYTES: Final = 1 << 28
"""Bytes that are given a place between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Creation:
    """What was made.

    Attributes:
        path: The image.
        size: Bytes of the disk.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: The name of the base, as it is stored.
        backing_format: What the base is.
    """

    path: str
    size: int
    cluster_size: int
    table_size: int
    backing: str | None = None
    backing_format: str | None = None


def create(
    path: str,
    size: int | None = None,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing: str | None = None,
    backing_format: Literal["raw", "qed"] | None = None,
    unsafe: bool = False,
    overwrite: bool = False,
    fill: Callable[[str], object] | None = None,
) -> Creation:
    """Make an image; until it is complete there is nothing at ``path``, or the old file.

    Args:
        path: Where.
        size: Bytes of the disk; those of the base if left out.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: The base, by a name that is absolute or begins at the image's directory.
        backing_format: What the base is; may be left out if it is QED.
        unsafe: Do not look at the base, which need not be there.
        overwrite: Replace a file that is there, unless somebody has it open as an image.
        fill: Called with the name that the image has until it is complete.

    Raises:
        UsageError: A size or the geometry makes no sense, or the file is there.
        BackingError: The base is missing or not what it is said to be.
        ImageInUseError: Somebody has the old file open, or has put another one there
            meanwhile.
        HostError: The host refused, or is full; nothing is left behind.
    """
    if backing == "":
        msg = f"{printable(path)}: backing file: found an empty name, expected one, or none at all"
        raise UsageError(msg)
    if backing is not None and not unsafe:
        found, backing_format = _look_at_base(path, backing, backing_format)
        size = found if size is None else size
    elif backing is not None and backing_format is None:
        msg = f"{printable(path)}: backing file {printable(backing)}: its format must be given"
        raise UsageError(msg)
    if size is None:
        msg = f"{printable(path)}: size: found none, expected one, or a base that has one"
        raise UsageError(msg)
    header = new_header(
        size, cluster_size, table_size, backing, backing_is_raw=backing_format == "raw"
    )
    make_image(path, header, backing, overwrite=overwrite, fill=fill)
    return Creation(path, header.image_size, cluster_size, table_size, backing, backing_format)


def _look_at_base(
    image: str, name: str, wanted: Literal["raw", "qed"] | None
) -> tuple[int, Literal["raw", "qed"]]:
    """Open a base for reading, only to learn its size in bytes and its format.

    Nothing is locked: it may be in use.  What it is based on itself is not opened but to
    find out whether it is the image.

    Raises:
        BackingError: It is missing, the image itself, or not what it is said to be.
    """
    path = backing_path(image, name)
    about, shown = f"{printable(image)}: backing file", printable(path)
    refuse_backing_loop(image, name)
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
    expected = "a QED image" if wanted else "a format: -F raw takes its bytes as they are"
    msg = f"{about} {shown}: found no QED magic, expected {expected}"
    raise BackingError(msg)


async def preallocate(path: str, progress: Progress | None = None) -> None:
    """Give each cluster of a disk without a base a place, and room on the host.

    ``progress`` is called with the bytes that have a place, and how many are to have one.

    Raises:
        NoSpaceError: The host is full.
    """
    # Loaded late: an image without preallocation needs no disk to be opened.
    from qedfuse.disk.opening import open_disk  # noqa: PLC0415
    from qedfuse.disk.options import OpenOptions  # noqa: PLC0415

    async with open_disk(path, OpenOptions(writable=True)) as disk:
        for at in range(0, disk.size, _ALLOCATION_CHUNK_BYTES):
            if progress is not None:
                progress(at, disk.size)
            await disk.allocate(at, _ALLOCATION_CHUNK_BYTES)
