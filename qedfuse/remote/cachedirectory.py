"""The cache of one user: a directory for each URL, and in it an entry for each version.

    DIRECTORY/<hash of the URL>/<hash of the version>/{data,map,about.json}

Entries that no process has open are removed, the least recently used ones first, if the cache is
larger than its limit or the file system is nearly full.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError
from qedfuse.hostio.regular import allocated_bytes
from qedfuse.remote.client import Version
from qedfuse.remote.unitfile import DATA_NAME, UnitFile, make_files, remove_entry
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.remote.address import Address

_log = logging.getLogger(__name__)

_ABOUT_NAME: Final = "about.json"
_FREE_FRACTION: Final = 0.05
"""The part of the file system that the cache leaves free."""
_NEW_PREFIX: Final = "new-"
"""How the names of directories begin in which an entry is being made."""


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
    """Return the user's directory for the cache (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # noqa: PTH117  str paths
        home = os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118  str paths
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
        path = os.path.join(parent, _hash(f"{version.size} {version.validator}"))  # noqa: PTH118
        try:
            for is_last in (False, True):
                try:
                    entry = UnitFile.open(path, version.size)
                except FileNotFoundError:
                    pass
                except OSError:
                    if is_last:
                        raise
                    _set_aside(path)
                else:
                    os.utime(path)  # the time of the last use
                    return entry
                self._make_entry(parent, path, address, version)
            return UnitFile.open(path, version.size)
        except OSError as error:
            msg = f"{printable(path)}: cache entry: {error.strerror}"
            raise CacheError(msg, error.errno or 0) from error

    def complete_entries(self, address: Address) -> Iterator[tuple[Version, UnitFile]]:
        """Yield the entries of an object that hold all of its content, the last used one first.

        The caller closes each entry.  Entries that cannot be read are left out.
        """
        parent = self._directory_of(address)
        for path in reversed(_by_last_use([parent])):
            try:
                with open(os.path.join(path, _ABOUT_NAME), encoding="utf-8") as file:  # noqa: PTH118, PTH123
                    version = Version(**json.load(file)["version"])
                entry = UnitFile.open(path, version.size)
            except (OSError, ValueError, TypeError, KeyError):
                continue
            try:
                is_complete = entry.count_present() == entry.units
            except OSError:
                is_complete = False
            if is_complete:
                yield version, entry
            else:
                entry.close()

    def make_room(self) -> None:
        """Remove entries that no process has open, until the cache is within its limits.

        Does nothing if the host refuses.
        """
        with suppress(OSError):
            parents = [entry.path for entry in os.scandir(self._path) if entry.is_dir()]
            for path in _by_last_use(parents):
                if not self._is_too_large():
                    return
                remove_entry(path)

    def _is_too_large(self) -> bool:
        """Return whether the cache has more than its limit, or leaves too little space free."""
        host = os.statvfs(self._path)
        if host.f_bavail < host.f_blocks * _FREE_FRACTION:
            return True
        return self._max_bytes is not None and self._used_bytes() > self._max_bytes

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
        """Make an empty entry, unless another process makes it at the same time.

        Raises:
            OSError: The host refused.
        """
        self.make_room()
        os.makedirs(parent, mode=0o700, exist_ok=True)  # noqa: PTH103  str paths
        new = tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=parent)
        try:
            make_files(new, version.size)
            about = {"url": address.shown, "version": asdict(version)}
            with open(os.path.join(new, _ABOUT_NAME), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
                json.dump(about, file)
            # Others see the entry only when it is whole.
            os.rename(new, path)  # noqa: PTH104  str paths
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            if not os.path.isdir(path):  # noqa: PTH112  str paths
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


def _set_aside(path: str) -> None:
    """Give an entry that cannot be used another name, and remove it if no process has it open.

    Processes that have it open go on with the files that they have.

    Raises:
        OSError: The host refused.
    """
    aside = tempfile.mkdtemp(prefix=_NEW_PREFIX, dir=os.path.dirname(path))  # noqa: PTH120  str paths
    os.rename(path, aside)  # noqa: PTH104  replaces the empty directory
    remove_entry(aside)


def _hash(text: str) -> str:
    """Return a name for a directory, which differs for all texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
