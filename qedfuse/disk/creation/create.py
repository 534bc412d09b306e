"""Making a new, empty image: the one way for all, the toolbox, the mount and the API.

The image has a temporary name until it is complete and durable.  So at any moment the
name holds what was there before, nothing, or a whole image.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from qedfuse.disk.creation.newheader import new_header
from qedfuse.errors import HostError
from qedfuse.hostio.newfile import NewFile
from qedfuse.hostio.replacedfile import lock_replaced_file
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.ondisk.header import build_header
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """Make an image of ``size`` bytes, rounded up to whole sectors, at ``path``, durably.

    Args:
        path: Where; an existing file is refused unless ``overwrite`` is given.
        size: Bytes of the disk.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: Name of the backing file, as it is stored: absolute, or relative to
            the directory of the image.  The file is not looked at.
        backing_is_raw: Never guess the backing file's format; it is raw.
        overwrite: Replace a file that is there already, unless somebody has it open as
            an image.  The new file has its owner and permissions.
        mode: Permissions of a file where there was none, less the umask.

    Raises:
        UsageError: A size is out of its range, the name is too long, or the file is there.
        ImageError: What is there is not a regular file.
        ImageInUseError: Somebody has the old file open, or has put another one there
            meanwhile.
        HostError: The file cannot be made; an old one is as it was.
    """
    # Loaded late: who makes images by `make_image` does not wait for an event loop to load.
    import trio  # noqa: PLC0415

    header = new_header(size, cluster_size, table_size, backing, backing_is_raw=backing_is_raw)
    await trio.to_thread.run_sync(
        partial(make_image, path, header, backing, overwrite=overwrite, mode=mode)
    )


def make_image(
    path: str,
    header: Header,
    backing: str | None,
    *,
    overwrite: bool = False,
    mode: int = 0o644,
    fill: Callable[[str], object] | None = None,
) -> None:
    """Make an image without any data at ``path``; it is durable on return.

    Until it is complete there is nothing at ``path``, or the old file.

    Args:
        path: Where.
        header: What `new_header` made.
        backing: Name of the backing file, as it is stored.
        overwrite: Replace a file that is there, unless somebody has it open as an image.
        mode: Permissions of a file where there was none, less the umask.
        fill: Called with the name that the image has until it is complete.

    Raises:
        UsageError: The file is there.
        ImageError: What is there is not a regular file.
        ImageInUseError: Somebody has the old file open, or has put another one there
            meanwhile.
        HostError: The host refused, or is full; nothing is left behind.
    """
    with ExitStack() as stack:
        old = lock_replaced_file(path, stack, overwrite=overwrite)
        new = stack.enter_context(NewFile(path, mode=mode, old=old, overwrite=overwrite))
        try:
            _write_empty(new.path, header, os.fsencode(backing or ""))
            if fill is not None:
                fill(new.path)
        except HostError as error:
            # The user has never heard of the other name.
            text = str(error).replace(printable(new.path), printable(path))
            raise type(error)(text, error.errno) from error
        new.commit()


def _write_empty(path: str, header: Header, backing: bytes) -> None:
    """Write an image without any data over an empty file.

    Raises:
        HostError: The host refused.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC), "r+b") as file:
            os.ftruncate(file.fileno(), header.l1_end)
            file.write(build_header(header) + backing)
    except OSError as error:
        raise HostError.from_os(error, printable(path), "cannot make") from error
