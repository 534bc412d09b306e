"""The cache of one user: a directory for each URL, and in it an entry for each version.

    DIRECTORY/<hash of the URL>/<hash of the version>/{data,map,about.json}

Entries that no process has open are removed, the least recently used ones first, if the cache is
larger than its limit or the file system is nearly full.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError
from qedfuse.hostio.regular import allocated_bytes
from qedfuse.remote.client import Version
from qedfuse.remote.unitfile import (
    DATA_NAME,
    NEW_PREFIX,
    UnitFile,
    make_files,
    remove_entry,
    set_aside,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.remote.address import Address

_ABOUT_NAME: Final = "about.json"
_MAX_ABOUT_BYTES: Final = 1 << 20
_FREE_FRACTION: Final = 0.05
"""The part of the file system that the cache leaves free."""
_MAX_ROOM_BYTES: Final = 64 << 20
"""How many bytes may be stored at most before the limits of the cache are looked at again."""
_MAX_MAKING_SECONDS: Final = 60.0
"""After this time, a directory in which an entry is being made is one that a crash has left."""
_MAX_TRIES: Final = 5
"""How often an entry is opened or made while other processes make or remove the same one."""
_PAUSE_SECONDS: Final = 0.02
_UNUSABLE: Final = (
    *(errno.ENOENT, errno.EBADMSG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO),
)
"""Errors of opening an entry that is missing or is none."""
_RACES: Final = (errno.EWOULDBLOCK, errno.EEXIST, errno.ENOTEMPTY)
"""Errors of an entry that another process makes or removes at the same time."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Where the cache is, and how large it may become.

    Attributes:
        directory: The directory of the cache.  It is made if it is missing.
        max_bytes: Maximum space of the cache; None for as much as leaves a part of the file
            system free.
    """

    directory: str
    max_bytes: int | None = None


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
    return os.path.join(home, "qedfuse")  # noqa: PTH118  str paths


class CacheDirectory:
    """Finds, makes and removes the entries of a cache."""

    def __init__(self, options: CacheOptions) -> None:
        """Use the directory that ``options`` name; make it if it is missing.

        Raises:
            CacheError: The directory cannot be used, or other users can change it.
        """
        self._path = os.path.abspath(options.directory)  # noqa: PTH100  str paths
        self._max_bytes = options.max_bytes
        shown = printable(self._path)
        try:
            os.makedirs(self._path, mode=0o700, exist_ok=True)  # noqa: PTH103  str paths
            status = os.stat(self._path)  # noqa: PTH116  str paths
        except OSError as error:
            msg = f"{shown}: cache directory: {error.strerror}"
            raise CacheError(msg, error.errno or 0) from error
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            found = "another owner" if status.st_uid != os.geteuid() else "write access for others"
            msg = f"{shown}: cache directory: found {found}, expected a directory of this user only"
            raise CacheError(msg)

    def open_entry(self, address: Address, version: Version) -> UnitFile:
        """Open the entry for a version of an object; make the entry if it is missing.

        An entry that cannot be used is removed first.

        Raises:
            CacheError: The host refused.
        """
        parent = self._directory_of(address)
        path = os.path.join(parent, _entry_name(version))  # noqa: PTH118  str paths
        number = 1
        while True:
            try:
                return self._open_or_make(parent, path, address, version)
            except OSError as error:
                if number == _MAX_TRIES or error.errno not in (*_RACES, *_UNUSABLE):
                    msg = f"{printable(path)}: cache entry: {error.strerror}"
                    raise CacheError(msg, error.errno or 0) from error
            number += 1
            time.sleep(_PAUSE_SECONDS)

    def _open_or_make(self, parent: str, path: str, address: Address, version: Version) -> UnitFile:
        """Open an entry, or make it; remove one that cannot be used.

        Raises:
            OSError: The host refused, or another process makes or removes the entry.
        """
        try:
            entry = UnitFile.open(path, version.size)
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            if os.path.lexists(path):
                set_aside(path)
            self._make_entry(parent, path, address, version)
            return UnitFile.open(path, version.size)
        with suppress(OSError):
            os.utime(path)  # the time of the last use
        return entry

    def complete_entries(self, address: Address) -> Iterator[tuple[Version, UnitFile]]:
        """Yield the entries of an object that hold all of its content, the last used one first.

        The caller closes each entry.  Entries that cannot be read are left out.
        """
        parent = self._directory_of(address)
        for path in reversed(_by_last_use([parent])):
            try:
                version = _read_about(path)
                entry = UnitFile.open(path, version.size)
            except (OSError, ValueError):
                continue
            try:
                is_complete = entry.count_present(0, entry.units - 1) == entry.units
            except OSError:
                is_complete = False
            if is_complete:
                with suppress(OSError):
                    os.utime(path)
                yield version, entry
            else:
                entry.close()

    def make_room(self, hidden_bytes: int = 0) -> int:
        """Remove entries that no process has open, until the cache is within its limits.

        Args:
            hidden_bytes: The space that open files take up which were removed from the cache.

        Returns:
            How many bytes may be stored before the next call; 0 if the cache is at a limit
            although all other entries were removed, or if the host refuses.
        """
        try:
            parents = [entry.path for entry in os.scandir(self._path) if entry.is_dir()]
            paths = _by_last_use(parents)
            for path in filter(_is_new, paths):
                if time.time() - os.lstat(path).st_mtime > _MAX_MAKING_SECONDS:
                    remove_entry(path)
            for path in paths:
                if self._room_bytes(hidden_bytes) > 0:
                    break
                if not _is_new(path):
                    remove_entry(path)
            return min(max(self._room_bytes(hidden_bytes), 0), _MAX_ROOM_BYTES)
        except OSError:
            return 0

    def _room_bytes(self, hidden_bytes: int) -> int:
        """Return how many bytes may be stored; a negative number if the cache is too large.

        Raises:
            OSError: The host refused.
        """
        room = _MAX_ROOM_BYTES
        host = os.statvfs(self._path)
        if host.f_blocks:  # some file systems do not say how large they are
            kept = int(host.f_blocks * _FREE_FRACTION)
            room = (host.f_bavail - kept) * host.f_frsize
        if self._max_bytes is not None:
            room = min(room, self._max_bytes - self._used_bytes() - hidden_bytes)
        return room

    def _used_bytes(self) -> int:
        """Return the space in bytes that the data of all entries take up."""
        used = 0
        for parent in os.scandir(self._path):
            for path in _by_last_use([parent.path]):
                with suppress(OSError):
                    used += allocated_bytes(os.stat(os.path.join(path, DATA_NAME)))  # noqa: PTH116, PTH118
        return used

    def _directory_of(self, address: Address) -> str:
        """Return the directory for the entries of an object."""
        return os.path.join(self._path, _hash(address.url))  # noqa: PTH118  str paths

    def _make_entry(self, parent: str, path: str, address: Address, version: Version) -> None:
        """Make an empty entry.

        Raises:
            OSError: The host refused, or another process has made the entry.
        """
        self.make_room()
        os.makedirs(parent, mode=0o700, exist_ok=True)  # noqa: PTH103  str paths
        new = tempfile.mkdtemp(prefix=NEW_PREFIX, dir=parent)
        try:
            make_files(new, version.size)
            about = {"url": address.shown, "version": asdict(version)}
            _write_private(os.path.join(new, _ABOUT_NAME), json.dumps(about))  # noqa: PTH118
            # Others see the entry only when it is whole.
            os.rename(new, path)  # noqa: PTH104  str paths
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise


def _by_last_use(parents: list[str]) -> list[str]:
    """Return the paths of all entries in some directories, the last used one last."""
    found = []
    for parent in parents:
        with suppress(OSError):
            for entry in os.scandir(parent):
                with suppress(OSError):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path))
    return [path for _, path in sorted(found)]


def _is_new(path: str) -> bool:
    """Return whether a directory is one in which an entry is being made or removed."""
    return os.path.basename(path).startswith(NEW_PREFIX)  # noqa: PTH119  str paths


def _read_about(path: str) -> Version:
    """Return the version that an entry is about.

    Raises:
        OSError: The host refused.
        ValueError: The file is damaged.
    """
    with open(os.path.join(path, _ABOUT_NAME), "rb") as file:  # noqa: PTH118, PTH123
        content = file.read(_MAX_ABOUT_BYTES)
    try:
        about = json.loads(content)
        found = about["version"]
        version = Version(int(found["size"]), str(found["etag"]), found["modified"])
        name = _entry_name(version)
    except (LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(_ABOUT_NAME) from error
    if version.size < 0 or name != os.path.basename(path):  # noqa: PTH119  str paths
        raise ValueError(_ABOUT_NAME)
    return version


def _write_private(path: str, text: str) -> None:
    """Write a new file that only this user can read.

    Raises:
        OSError: The host refused.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123  a descriptor
        file.write(text)


def _entry_name(version: Version) -> str:
    """Return the name of the directory for a version."""
    return _hash(f"{version.size} {version.validator}")


def _hash(text: str) -> str:
    """Return a name for a directory, which differs for all texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
