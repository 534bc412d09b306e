"""The directories of mount records (`mountrecord`), to which only the mount's user can write."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final

from qedfuse.errors import PrivilegeError
from qedfuse.text import printable

NO_RECORD: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""The errors of open(2) for a directory or a file that is missing or of the wrong type."""


STATISTICS_SUFFIX: Final = ".stats"
"""The suffix of the socket for a mount's statistics, which lies beside the mount's record.  An
example is ``0:42.1234.stats``."""


def remove_socket(directory: int, record: str) -> None:
    """Remove the socket that belongs to the record file ``record``; ignore a failure."""
    with contextlib.suppress(OSError):
        os.unlink(record + STATISTICS_SUFFIX, dir_fd=directory)


def record_directories(user: int) -> list[Path]:
    """List the directories in which records of a user's mounts may be, the preferred one first.

    The environment variable ``XDG_RUNTIME_DIR`` counts only for the user of this process.
    """
    if user == 0:
        return [Path("/run/qedfuse")]
    directories = [
        Path(f"/run/user/{user}/qedfuse"),
        Path(f"/tmp/qedfuse-{user}"),  # noqa: S108  its owner and mode are checked before use
    ]
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own and user == os.getuid():
        directories.insert(0, Path(own) / "qedfuse")
    return directories


def open_directory(path: Path, user: int, *, make: bool) -> int:
    """Open a directory of records, if only ``user`` can write to it; return a descriptor.

    Args:
        path: The directory.
        user: The user who must own the directory.
        make: Whether to make the directory if it is missing.

    Raises:
        OSError: The directory cannot be made or opened, or the path is not a directory.
        PrivilegeError: The directory has another owner, or others can write to it.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(fd)
    if status.st_uid != user or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        msg = (
            f"{printable(path)}: found a directory that another user owns or can write to, "
            "expected a directory of this user that no other user can write to"
        )
        raise PrivilegeError(msg)
    return fd
