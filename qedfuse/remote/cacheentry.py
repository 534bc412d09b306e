"""The files of one entry of the cache: how they are made and removed.

An entry is the directory DIRECTORY/object-HASH/version-HASH, or new-RANDOM in place of version-HASH
while the entry is being made or removed.  Only directories with such names are removed, and in them
only the cache's own files.  No symbolic link is followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.hostio.regular import allocated_bytes
from qedfuse.remote.cachemetadata import is_metadata_name, write_metadata
from qedfuse.remote.cacheroot import OBJECT_NAME
from qedfuse.remote.unitfile import DATA_NAME, MAP_NAME, make_files, open_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.remote.client import Version

_NEW_PREFIX: Final = "new-"
_ENTRY_NAME: Final = re.compile(r"version-[0-9a-f]{32}|new-[0-9a-f]{32}")


class Entry(NamedTuple):
    """An entry in the directory of the cache, at the moment when the directory was read.

    Attributes:
        used: Time of the last use, or of the creation before any use, in nanoseconds since 1970.
        path: The directory of the entry.
        length: Disk space in bytes that the data of the entry takes up.
    """

    used: int
    path: str
    length: int

    @property
    def is_new(self) -> bool:
        """Whether the entry is being made or removed."""
        return os.path.basename(self.path).startswith(_NEW_PREFIX)  # noqa: PTH119  str paths


def list_objects(directory: str) -> list[str]:
    """Return the directories of all objects in the directory of a cache.

    Raises:
        OSError: A system call failed.
    """
    return [entry.path for entry in _directories(directory, OBJECT_NAME)]


def list_entries(parents: list[str]) -> list[Entry]:
    """Return the entries in directories of objects, the most recently used one last.

    What cannot be read is skipped.
    """
    found = []
    for parent in parents:
        with suppress(OSError):
            for entry in _directories(parent, _ENTRY_NAME):
                with suppress(OSError):
                    used = entry.stat(follow_symlinks=False).st_mtime_ns
                    found.append(Entry(used, entry.path, _data_bytes(entry.path)))
    return sorted(found)  # by `used`, the first field


def make_entry(parent: str, path: str, shown: str, version: Version) -> None:
    """Make an empty entry ``path`` in the directory ``parent``, which is made if it is missing.

    Other processes can open the entry only when it is complete.

    Args:
        parent: The directory for the entries of an object.
        path: The directory of the entry.
        shown: The URL of the object without secrets, for people who look into the cache.
        version: The version of the object.

    Raises:
        OSError: A system call failed, another process has made the entry, or a path is not a
            directory.
    """
    with suppress(FileExistsError):
        os.mkdir(parent, 0o700)  # noqa: PTH102  str paths
    if not stat.S_ISDIR(os.lstat(parent).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    new = _new_path(parent)
    os.mkdir(new, 0o700)  # noqa: PTH102  str paths
    try:
        make_files(new, version.size)
        write_metadata(new, shown, version)
        os.rename(new, path)  # noqa: PTH104  str paths
    except OSError:
        _remove_files(new)
        raise


def discard_entry(path: str, directory: int) -> None:
    """Rename a damaged entry, and remove it if no process has it open.

    Processes that have the entry open keep using the open files.

    Args:
        path: The directory of the entry.
        directory: A descriptor of this directory.

    Raises:
        OSError: A system call failed, or ``path`` is another directory now (EWOULDBLOCK).
    """
    remove_entry(_rename_aside(path, directory))


def remove_entry(path: str) -> bool:
    """Remove an entry if no process has it open; return False if the entry is kept.

    An entry with files that are not the cache's is kept.  If the host refuses to remove a file, the
    result is True, but the rest of the entry stays under a new name.
    """
    try:
        with ExitStack() as stack:
            directory = open_directory(path)
            stack.callback(os.close, directory)
            if not all(map(_is_own_name, os.listdir(directory))):  # noqa: PTH208  a descriptor
                return False
            fd = _open_data(directory)
            if fd >= 0:
                stack.callback(os.close, fd)
                # Only a process that has the entry open holds this lock.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The entry is renamed before its files are removed, because as soon as one is missing,
            # another process may make a new entry of the same name.
            _remove_files(_rename_aside(path, directory))
    except OSError:
        return False
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))  # noqa: PTH106, PTH120  only if it is empty
    return True


def _directories(path: str, name: re.Pattern[str]) -> Iterator[os.DirEntry[str]]:
    """Yield the subdirectories of the directory ``path`` whose names match ``name``."""
    with os.scandir(path) as found:
        for entry in found:
            if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield entry


def _is_own_name(name: str) -> bool:
    """Return whether ``name`` is the name of a file of an entry."""
    return name in {DATA_NAME, MAP_NAME} or is_metadata_name(name)


def _data_bytes(path: str) -> int:
    """Return the disk space in bytes of the data of an entry; 0 if there is no data file."""
    try:
        return allocated_bytes(os.lstat(os.path.join(path, DATA_NAME)))  # noqa: PTH118  str paths
    except OSError:
        return 0


def _open_data(directory: int) -> int:
    """Return a descriptor of an entry's data file; -1 if it is missing or cannot be such a file."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(DATA_NAME, flags, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        return -1


def _new_path(parent: str) -> str:
    """Return an unused path new-RANDOM in ``parent``; no process opens an entry at such a path."""
    return os.path.join(parent, _NEW_PREFIX + secrets.token_hex(16))  # noqa: PTH118  str paths


def _rename_aside(path: str, directory: int) -> str:
    """Rename an entry, so that no process can open it any more; return the new path.

    Since ``directory`` was opened as ``path``, other processes may have removed the entry and made
    another one at ``path``, which they use.  Then EWOULDBLOCK is raised.
    """
    opened = os.fstat(directory)
    if not os.path.samestat(os.lstat(path), opened):
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
    aside = _new_path(os.path.dirname(path))  # noqa: PTH120  str paths
    os.rename(path, aside)  # noqa: PTH104  str paths
    if not os.path.samestat(os.lstat(aside), opened):
        # Another process has replaced the entry since the comparison.  The renaming fails if there
        # is a third entry at `path`, because no entry is an empty directory.
        with suppress(OSError):
            os.rename(aside, path)  # noqa: PTH104  str paths
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
    return aside


def _remove_files(path: str) -> None:
    """Remove the files of an entry, and its directory if it is empty; ignore errors of the host."""
    with suppress(OSError):
        fd = open_directory(path)
        try:
            for name in filter(_is_own_name, os.listdir(fd)):  # noqa: PTH208  a descriptor
                try:
                    os.unlink(name, dir_fd=fd)
                except IsADirectoryError:
                    with suppress(OSError):
                        os.rmdir(name, dir_fd=fd)
                except OSError:
                    pass
        finally:
            os.close(fd)
        os.rmdir(path)  # noqa: PTH106  str paths
