"""Making a new, empty image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.disk.newheader import new_header
from qedfuse.errors import cannot_open
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.ondisk.header import build_header

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


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


async def write_empty(file: HostFile, header: Header, backing: bytes) -> None:
    """Write an image without any data into an empty file, and make it durable."""
    # The file gets its length first and its magic last, in effect: until the header is
    # there nobody takes the file for an image.
    await file.truncate(header.l1_end)
    await file.pwrite(0, build_header(header), backing)
    await file.datasync()
