"""The cache of one user: a directory for each object, and in it an entry for each version.

    DIRECTORY/object-<hash of URL and store>/version-<hash of the version>/{data,map,about.json}

If the cache is larger than its limit, or the file system is nearly full, entries that no process
has open are removed, the least recently used ones first.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError
from qedfuse.remote.cacheentry import (
    Entry,
    discard_entry,
    list_entries,
    list_objects,
    make_entry,
    remove_entry,
)
from qedfuse.remote.cachemetadata import entry_name, name_hash, read_metadata, repair_metadata
from qedfuse.remote.cacheroot import directory_waits_for_server, prepare_directory
from qedfuse.remote.unitfile import UnitFile, open_directory
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import Version

_FREE_FRACTION: Final = 0.05
"""The fraction of the file system that the cache leaves free."""
_MAX_GRANT_BYTES: Final = 64 << 20
"""Maximum number of bytes that may be stored before the limits of the cache are checked again."""
_MAX_NEW_ENTRY_SECONDS: Final = 60.0
"""For how long after its last use an entry that is being made or removed is left alone.  Older ones
are removed, unless a process has locked them: most were left by a crash."""
_MAX_ATTEMPTS: Final = 50
"""Maximum number of attempts to open or make an entry that others open, make or remove.

Together with the pauses they take a second: on a busy machine another process can have the lock of
an entry for longer than the few microseconds that it needs."""
_RETRY_PAUSE_SECONDS: Final = 0.02
_UNUSABLE: Final = (
    *(errno.ENOENT, errno.EBADMSG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO),
)
"""Errors of opening an entry that is missing or damaged, or whose path is not a directory."""
_RACES: Final = (errno.EWOULDBLOCK, errno.EEXIST, errno.ENOTEMPTY)
"""Errors of opening or making an entry that another process makes or removes."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Where the cache is, and how large it may become.

    Attributes:
        directory: The directory of the cache, which is made if it is missing.
        max_bytes: Maximum disk space of the cache; None for no maximum.  In any case the cache
            leaves 5 % of the file system free.
    """

    directory: str
    max_bytes: int | None = None


class CacheDirectory:
    """Finds, makes and removes the entries of a cache.

    An object is identified by its URL and its store (`Client.store_id`).
    """

    def __init__(self, options: CacheOptions) -> None:
        """Use the directory that ``options`` name; make it if it is missing.

        Raises:
            CacheError: The directory cannot be used; see `prepare_directory`.
        """
        self._given = str(Path(options.directory).absolute())
        self._path = prepare_directory(self._given)
        self._max_bytes = options.max_bytes

    def waits_for_server(self) -> bool:
        """Return whether calls on files of the cache may wait for a server (NFS, FUSE)."""
        try:
            return directory_waits_for_server(self._path)
        except OSError:
            return True

    def open_entry(self, address: Address, version: Version, store_id: str = "") -> UnitFile:
        """Open the entry for a version of an object; make it if it is missing or damaged.

        Raises:
            CacheError: A system call failed, a file that is not an entry has the entry's name, or
                other processes made or removed the entry during all attempts.
        """
        number = 1
        while True:
            parent = self._directory_of(address, store_id)
            path = os.path.join(parent, entry_name(version))  # noqa: PTH118  str paths
            try:
                return self._open_or_make(parent, path, address, version)
            except OSError as error:
                if number == _MAX_ATTEMPTS or error.errno not in (*_RACES, *_UNUSABLE):
                    msg = f"{printable(path)}: cache entry: {error.strerror}"
                    raise CacheError(msg, error.errno or 0) from error
            number += 1
            time.sleep(_RETRY_PAUSE_SECONDS)

    def _open_or_make(self, parent: str, path: str, address: Address, version: Version) -> UnitFile:
        """Open the entry ``path``; make it if it is missing or damaged."""
        if os.path.islink(parent):  # noqa: PTH114  str paths
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        entry = _open_or_discard(path, version.size)
        if entry is not None:
            repair_metadata(entry, address.shown, version)
            mark_used(entry)
            return entry
        with suppress(CacheError):  # `make_entry` raises the reason
            self.evict()
        make_entry(parent, path, address.shown, version)
        return UnitFile.open(path, version.size)

    def offline_entries(
        self, address: Address, store_id: str = ""
    ) -> Iterator[tuple[Version, UnitFile]]:
        """Open and yield the entries of an object that can be used without a server.

        An object is cached in units (blocks of 256 KiB).  A usable entry has all units that
        `mark_usable_offline` has recorded for it; without a record, all units of the object.  The
        most recently used entry comes first.  The caller must close each entry.
        """
        parent = self._directory_of(address, store_id)
        for found in reversed(list_entries([parent])):
            try:
                version, needed = read_metadata(found.path)
                entry = _open_retrying(found.path, version.size)
            except (OSError, ValueError):
                continue
            with suppress(OSError):
                if entry.has_units(needed):
                    yield version, entry
                    continue
            entry.close()

    def stored_part(
        self, address: Address, store_id: str = "", wanted: tuple[int, str] | None = None
    ) -> tuple[int, int] | None:
        """Return an estimate of how many bytes the cache has of an object, and the object's size.

        The estimate is the disk space of the entry.  Both are for the version with the size and
        validator in ``wanted``; without ``wanted``, for the version that was used last.  None if
        the cache has no byte of this version.
        """
        for found in reversed(list_entries([self._directory_of(address, store_id)])):
            try:
                version, _needed = read_metadata(found.path)
            except (OSError, ValueError):
                continue
            if wanted is None or wanted == (version.size, version.validator):
                stored = min(found.length, version.size)
                return (stored, version.size) if stored else None
        return None

    def evict(self, in_use: UnitFile | None = None) -> int:
        """Remove entries that no process has open, until the cache is within its limits.

        Unfinished entries that a crash has left are removed in any case.  The directory of the
        cache is made if it is missing.

        Args:
            in_use: The entry for which space is needed; None for none.  If it was removed from the
                cache, its disk space still counts.

        Returns:
            How many bytes may be stored before the next call; 0 if the cache is still at a limit.

        Raises:
            CacheError: The directory cannot be used, and ``in_use`` was not removed from it.
        """
        removed = None if in_use is None else in_use.removed_usage()
        used = 0 if removed is None else removed.allocated_bytes
        try:
            self._path = prepare_directory(self._given)
        except CacheError:
            # The cache was deleted during a mount, and the sandbox of the mount forbids to make the
            # directory again.  The files of the removed entry can still be used.
            if removed is None:
                raise
            return self._grant(removed.filesystem, used)
        try:
            entries = list_entries(list_objects(self._path))
            used += sum(entry.length for entry in entries)
            for entry in entries:
                if self._must_evict(entry, used) and remove_entry(entry.path):
                    used -= entry.length
            return self._grant(os.statvfs(self._path), used)
        except OSError as error:
            msg = f"{printable(self._path)}: cache directory: {error.strerror}"
            raise CacheError(msg, error.errno or 0) from error

    def _must_evict(self, entry: Entry, used: int) -> bool:
        """Return whether an entry must be removed while the cache takes up ``used`` bytes."""
        if entry.is_new:
            return time.time() - entry.used / 1e9 > _MAX_NEW_ENTRY_SECONDS
        return self._free_bytes(os.statvfs(self._path), used) <= 0

    def _grant(self, host: os.statvfs_result, used: int) -> int:
        """Return how many bytes may be stored now beside ``used`` bytes; at least 0."""
        return min(max(self._free_bytes(host, used), 0), _MAX_GRANT_BYTES)

    def _free_bytes(self, host: os.statvfs_result, used: int) -> int:
        """Return how many bytes may be stored beside ``used`` bytes; negative above a limit.

        ``host`` is the state of the file system of the cache.
        """
        free = _MAX_GRANT_BYTES
        if host.f_blocks:  # some file systems do not report their size
            kept = int(host.f_blocks * _FREE_FRACTION)
            free = (host.f_bavail - kept) * host.f_frsize
        if self._max_bytes is not None:
            free = min(free, self._max_bytes - used)
        return free

    def _directory_of(self, address: Address, store_id: str) -> str:
        """Return the directory for the entries of an object."""
        name = f"object-{name_hash(f'{store_id} {address.url}')}"
        return os.path.join(self._path, name)  # noqa: PTH118  str paths


def _open_or_discard(path: str, size: int) -> UnitFile | None:
    """Open an entry; return None if it is missing, or was damaged and is now discarded."""
    try:
        directory = open_directory(path)
    except FileNotFoundError:
        return None
    try:
        return UnitFile.open_in(directory, path, size)
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise
        discard_entry(path, directory)
        return None
    finally:
        os.close(directory)


def _open_retrying(path: str, size: int) -> UnitFile:
    """Open an entry; repeat the attempt while other processes hold its locks."""
    for _ in range(_MAX_ATTEMPTS - 1):
        try:
            return UnitFile.open(path, size)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
        time.sleep(_RETRY_PAUSE_SECONDS)
    return UnitFile.open(path, size)


def mark_used(entry: UnitFile) -> None:
    """Record the present time as the time of the last use of an entry; ignore a failure."""
    with suppress(OSError):
        os.utime(entry.path)
