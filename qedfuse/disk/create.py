"""Making a new, empty image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError, cannot_open
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import (
    DEFAULT_CLUSTER_SIZE,
    DEFAULT_TABLE_SIZE,
    HEADER_BYTES,
    MAX_BACKING_NAME,
    MAX_CLUSTER_SIZE,
    MAX_TABLE_SIZE,
    MIN_CLUSTER_SIZE,
    MIN_TABLE_SIZE,
    SECTOR,
    Feature,
)
from qedfuse.ondisk.header import Header, build_header
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile


async def create_image(
    path: str,
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
    backing: str | None = None,
    backing_is_raw: bool = False,
    overwrite: bool = False,
    mode: int = 0o644,
) -> None:
    """Make an image of ``size`` bytes, rounded up to whole sectors, at ``path``.

    Args:
        path: Where; an existing file is refused unless ``overwrite`` is given.
        size: Bytes of the disk.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: Name of the backing file, as it is stored: absolute, or relative to
            the directory of the image.  The file is not looked at.
        backing_is_raw: Never guess the backing file's format; it is raw.
        overwrite: Replace a file that is there already.
        mode: Permissions of the new file, less the umask.

    Raises:
        UsageError: A size is out of its range, or the name is too long.
        HostError: The file cannot be made.
    """
    header = new_header(size, cluster_size, table_size, backing, backing_is_raw=backing_is_raw)
    access = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, access | (os.O_TRUNC if overwrite else os.O_EXCL), mode)
    except OSError as error:
        raise cannot_open(path, error) from error
    file = PosixFile(fd, path, writable=True)
    try:
        await write_empty(file, header, os.fsencode(backing or ""))
    except BaseException:
        os.unlink(path)  # noqa: PTH108  the name that was opened, as it is
        raise
    finally:
        file.close()


def new_header(
    size: int, cluster_size: int, table_size: int, backing: str | None, *, backing_is_raw: bool
) -> Header:
    """Build the header of an empty image, after checking what was asked for.

    Raises:
        UsageError: A size is out of its range, or the name is too long or not a path.
    """
    for what, value, least, most in (
        ("cluster size", cluster_size, MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE),
        ("table size", table_size, MIN_TABLE_SIZE, MAX_TABLE_SIZE),
    ):
        if not least <= value <= most or value & (value - 1):
            msg = f"{what}: found {value}, expected a power of two from {least} to {most}"
            raise UsageError(msg)
    name = os.fsencode(backing or "")
    if len(name) > MAX_BACKING_NAME or b":" in name.split(b"/", 1)[0] or b"\0" in name:
        msg = (
            f"backing file {printable(name)}: expected a plain path of at most "
            f"{MAX_BACKING_NAME} bytes (a file whose name has a colon is written ./NAME)"
        )
        raise UsageError(msg)
    features = 0
    if backing is not None:
        features = int(Feature.BACKING_FILE)
        if backing_is_raw:
            features |= int(Feature.BACKING_FORMAT_NO_PROBE)
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        features=features,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=cluster_size,
        image_size=-(-size // SECTOR) * SECTOR,
        backing_filename_offset=HEADER_BYTES if backing is not None else 0,
        backing_filename_size=len(name),
    )
    most = header.geometry.max_image_size
    if not 0 <= header.image_size <= most:
        msg = (
            f"image size: found {size}, expected 0 to {most} with clusters of {cluster_size} "
            f"bytes and tables of {table_size}"
        )
        raise UsageError(msg)
    return header


async def write_empty(file: HostFile, header: Header, backing: bytes) -> None:
    """Write an image without any data into an empty file, and make it durable."""
    # The file gets its length first and its magic last, in effect: until the header is
    # there nobody takes the file for an image.
    await file.truncate(header.l1_end)
    await file.pwrite(0, build_header(header), backing)
    await file.datasync()
