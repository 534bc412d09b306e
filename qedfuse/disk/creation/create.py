"""Creating an empty image, for the toolbox, the mount and the Python API.

The image has a temporary name until it is complete and durable.  So the final name refers to the
old file, to no file, or to a complete image.  There is one exception: on a file system without hard
links it may refer to an empty file for a moment (`NewFile`).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from qedfuse.disk.creation.newheader import new_header
from qedfuse.disk.lookup.rememberedbase import NewRecord
from qedfuse.errors import HostError
from qedfuse.hostio.newfile import NewFile
from qedfuse.hostio.replacedfile import lock_replaced_file
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.ondisk.header import build_header
from qedfuse.text import printable
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.lookup.baseversion import BaseVersions
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
    versions: BaseVersions | None = None,
) -> None:
    """Create an empty image at ``path``, durably.

    Args:
        path: The new file; an existing one is refused unless ``overwrite`` is given.
        size: Size of the disk in bytes, rounded up to whole sectors; may be 0.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
        backing: Name of the backing file that the image stores, see `backing_path`; None or empty
            for no backing file.  The file is not opened.
        backing_is_raw: Whether the image says that its backing file is raw.
        overwrite: Whether to replace an existing file, which no process may have open as an image.
            The new file gets its permissions and, as far as the host permits, its owner.
        mode: Permissions of the new file if it replaces none; the umask is subtracted.
        versions: The versions of the backing files, which the image remembers; None to remember
            those that are found when the image is first opened for writing.

    Raises:
        UsageError: A size is out of its range, the name of the backing file cannot be stored,
            or the file exists and ``overwrite`` is False.
        ImageError: The existing file is not a regular file.
        ImageInUseError: Another process has the old file open as an image, or has created another
            file of that name during the call.
        HostError: A system call failed.  Normally an existing file is unchanged then, and no new
            file is left behind.  If only making the name durable failed, the new file stays.
    """
    header = new_header(size, cluster_size, table_size, backing, backing_is_raw=backing_is_raw)
    await run_in_thread(
        partial(
            make_image, path, header, backing, overwrite=overwrite, mode=mode, versions=versions
        )
    )


def make_image(
    path: str,
    header: Header,
    backing: str | None,
    *,
    overwrite: bool = False,
    mode: int = 0o644,
    fill: Callable[[str], object] | None = None,
    versions: BaseVersions | None = None,
) -> None:
    """Create an image at ``path``, durably: an empty one, into which ``fill`` may write.

    Args:
        path: The new file.
        header: A header that `new_header` has built.
        backing: Name of the backing file that the image stores, for which ``header`` was
            built; None or empty for no backing file.
        overwrite: Whether to replace an existing file, which no process may have open as an image.
        mode: Permissions of the new file if it replaces none; the umask is subtracted.
        fill: Called with the temporary name of the empty image.  Its errors should name ``path``.
        versions: The versions of the backing files, as for `create_image`.

    Raises:
        UsageError: The file exists and ``overwrite`` is False.
        ImageError: The existing file is not a regular file.
        ImageInUseError: Another process has the old file open as an image, or has created another
            file of that name during the call.
        HostError: A system call failed, as for `create_image`.
    """
    record = NewRecord(backing or "", versions)
    with ExitStack() as stack:
        old = lock_replaced_file(path, stack, overwrite=overwrite)
        new = stack.enter_context(NewFile(path, mode=mode, old=old, overwrite=overwrite))
        try:
            _write_empty(new.path, header, os.fsencode(backing or ""), record)
        except OSError as error:
            # The message must show the name that the user gave, not the temporary one.
            raise HostError.from_os(error, printable(path), "cannot make") from error
        if fill is not None:
            fill(new.path)
        new.commit()
    record.finish(path)


def _write_empty(path: str, header: Header, backing: bytes, record: NewRecord) -> None:
    """Write header, backing name and ``record`` into an empty file; the L1 table is a hole."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC), "r+b") as file:
        os.ftruncate(file.fileno(), header.l1_end)
        file.write(build_header(header) + backing)
        record.store(file.fileno())
