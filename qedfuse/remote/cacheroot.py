"""The root directory of the cache.

The directory is private, and a file marks it as a cache.  A directory with files of other programs
is not made a cache.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from typing import Final

from qedfuse.errors import CacheError
from qedfuse.hostio.systemcalls import waits_for_server
from qedfuse.text import printable

OBJECT_NAME: Final = re.compile(r"object-[0-9a-f]{32}")
"""The names of the directories for objects, each with the entries of one object."""

_NAME: Final = "qedfuse"
"""The name of the cache's own directory."""
_TAG_NAME: Final = "CACHEDIR.TAG"
_TAG: Final = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Cache of qedfuse.  It may be deleted at any time.\n"
)
"""The content of the file that marks a directory as this cache.  Backup programs leave out such a
directory (https://bford.info/cachedir/)."""


def default_directory() -> str:
    """Return the user's directory for the cache (XDG Base Directory Specification).

    Raises:
        CacheError: The user has no home directory.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # noqa: PTH117  str paths
        home = os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118  str paths
    if not os.path.isabs(home):  # noqa: PTH117  str paths
        msg = "cache directory: found no home directory, expected one (or XDG_CACHE_HOME)"
        raise CacheError(msg)
    return os.path.join(home, _NAME)  # noqa: PTH118  str paths


def prepare_directory(path: str) -> str:
    """Make and mark a directory for the cache, if that is necessary; return its path.

    If ``path`` is not marked and has files that are not of a cache, the result is its subdirectory
    ``qedfuse``.

    Raises:
        CacheError: The directory cannot be used, other users can change it, or both ``path`` and
            its subdirectory have other content.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)  # noqa: PTH103  str paths
        _require_private(path, os.stat(path))  # noqa: PTH116  str paths
        if not _is_cache(path):
            path = os.path.join(path, _NAME)  # noqa: PTH118  str paths
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)  # noqa: PTH102  str paths
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            _require_private(path, status)
            if not _is_cache(path):
                msg = (
                    f"{printable(path)}: cache directory: found other files, "
                    "expected an empty directory"
                )
                raise CacheError(msg)
        _mark(path)
    except OSError as error:
        msg = f"{printable(path)}: cache directory: {error.strerror}"
        raise CacheError(msg, error.errno or 0) from error
    return path


def directory_waits_for_server(path: str) -> bool:
    """Return whether access to a directory may wait for a server (NFS, FUSE).

    Raises:
        OSError: The directory cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return waits_for_server(fd)
    finally:
        os.close(fd)


def _require_private(path: str, status: os.stat_result) -> None:
    """Raise CacheError if another user owns a directory, or can change it."""
    is_own = status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        found = "write access for others" if is_own else "another owner"
        msg = (
            f"{printable(path)}: cache directory: found {found}, "
            "expected a directory of this user only"
        )
        raise CacheError(msg)


def _is_cache(path: str) -> bool:
    """Return whether a directory is marked as a cache of qedfuse, or may become one.

    An unmarked directory may become one if it has nothing but files and directories of a cache.
    """
    with suppress(OSError):
        fd = _open_tag(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if os.read(fd, len(_TAG) + 1) == _TAG:
                return True
        finally:
            os.close(fd)
    with os.scandir(path) as found:
        return all(_is_cache_file(entry) for entry in found)


def _is_cache_file(entry: os.DirEntry[str]) -> bool:
    """Return whether a directory entry has the name and the type of an entry of a cache's root."""
    if entry.name == _TAG_NAME:  # with any content, because a crash may have truncated the file
        return entry.is_file(follow_symlinks=False)
    return bool(OBJECT_NAME.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)


def _mark(path: str) -> None:
    """Make the file that marks a directory as a cache, if it is missing; ignore a failure.

    A file that a crash or a full file system has truncated gets its content again.
    """
    with suppress(OSError):
        fd = _open_tag(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        try:
            found = os.read(fd, len(_TAG) + 1)
            # Another program's file keeps its content.
            if found != _TAG and _TAG.startswith(found.rstrip(b"\0")):
                os.pwrite(fd, _TAG, 0)
                os.ftruncate(fd, len(_TAG))
        finally:
            os.close(fd)


def _open_tag(path: str, flags: int) -> int:
    """Open the file that marks a cache, without following a link; return the descriptor."""
    return os.open(
        os.path.join(path, _TAG_NAME),  # noqa: PTH118  str paths
        flags | os.O_NOFOLLOW | os.O_CLOEXEC,
        0o600,
    )
