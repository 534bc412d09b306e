"""The cache of one user: a directory for each object, and in it an entry for each version.

    DIRECTORY/object-<hash of URL and store>/version-<hash of the version>/{data,map,about.json}

Entries that no process has open are removed, the least recently used ones first, if the cache is
larger than its limit or the file system is nearly full.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError
from qedfuse.remote.cacheentry import (
    Entry,
    discard_entry,
    entry_name,
    list_entries,
    list_objects,
    make_entry,
    name_hash,
    read_metadata,
    remove_entry,
)
from qedfuse.remote.cacheroot import directory_waits_for_server, prepare_directory
from qedfuse.remote.unitfile import UnitFile
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import Version

_FREE_FRACTION: Final = 0.05
"""The part of the file system that the cache leaves free."""
_MAX_GRANT_BYTES: Final = 64 << 20
"""How many bytes may be stored at most before the limits of the cache are looked at again."""
_MAX_CREATION_SECONDS: Final = 60.0
"""After this time, a directory in which an entry is being made is one that a crash has left."""
_MAX_ATTEMPTS: Final = 5
"""How often an entry is opened or made while other processes make or remove the same one."""
_RETRY_PAUSE_SECONDS: Final = 0.02
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


class CacheDirectory:
    """Finds, makes and removes the entries of a cache.

    An object is known by its URL and by the store that the URL's name of a bucket belongs to
    (`Client.store_id`).
    """

    def __init__(self, options: CacheOptions) -> None:
        """Use the directory that ``options`` name; make it if it is missing.

        Raises:
            CacheError: The directory cannot be used; see `prepare_directory`.
        """
        self._given = os.path.abspath(options.directory)  # noqa: PTH100  str paths
        self._path = prepare_directory(self._given)
        self._max_bytes = options.max_bytes

    def waits_for_server(self) -> bool:
        """Return whether calls on files of the cache may wait for a server; True if unknown."""
        try:
            return directory_waits_for_server(self._path)
        except OSError:
            return True

    def open_entry(self, address: Address, version: Version, store_id: str = "") -> UnitFile:
        """Open the entry for a version of an object; make the entry if it is missing.

        An entry that cannot be used is removed first.

        Raises:
            CacheError: The host refused, or something else has the name of the entry.
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
        """Open an entry, or make it; remove one that cannot be used.

        Raises:
            OSError: The host refused, or another process makes or removes the entry.
        """
        if os.path.islink(parent):  # noqa: PTH114  str paths
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        try:
            entry = UnitFile.open(path, version.size)
        except OSError as error:
            if error.errno not in _UNUSABLE:
                raise
            if os.path.lexists(path):
                discard_entry(path)
            self.evict()
            make_entry(parent, path, address.shown, version)
            return UnitFile.open(path, version.size)
        mark_used(entry)
        return entry

    def offline_entries(
        self, address: Address, store_id: str = ""
    ) -> Iterator[tuple[Version, UnitFile]]:
        """Yield the entries of an object that can be used without a server, the last used first.

        These are entries with all units, or with as many as `mark_usable_offline` has noted.  The
        caller closes each entry.  Entries that cannot be read are left out.
        """
        parent = self._directory_of(address, store_id)
        for found in reversed(list_entries([parent])):
            try:
                version, needed = read_metadata(found.path)
                entry = UnitFile.open(found.path, version.size)
            except (OSError, ValueError):
                continue
            with suppress(OSError):
                if entry.count_present(0, entry.units - 1) >= min(needed, entry.units):
                    yield version, entry
                    continue
            entry.close()

    def evict(self, unlinked_bytes: int = 0) -> int:
        """Remove entries that no process has open, until the cache is within its limits.

        A directory of the cache that was removed is made again.

        Args:
            unlinked_bytes: The space that open files take up which were removed from the cache.

        Returns:
            How many bytes may be stored before the next call; 0 if the cache is at a limit
            although all other entries were removed, or if the host refuses.
        """
        try:
            self._path = prepare_directory(self._given)
            entries = list_entries(list_objects(self._path))
            used = unlinked_bytes + sum(entry.length for entry in entries)
            for entry in entries:
                if self._must_evict(entry, used) and remove_entry(entry.path):
                    used -= entry.length
            return min(max(self._free_bytes(used), 0), _MAX_GRANT_BYTES)
        except (OSError, CacheError):
            return 0

    def _must_evict(self, entry: Entry, used: int) -> bool:
        """Return whether an entry must be removed while ``used`` bytes are in use.

        Raises:
            OSError: The host refused.
        """
        if entry.is_new:
            return time.time() - entry.used / 1e9 > _MAX_CREATION_SECONDS
        return self._free_bytes(used) <= 0

    def _free_bytes(self, used: int) -> int:
        """Return how many bytes may be stored; a negative number if the cache is too large.

        Raises:
            OSError: The host refused.
        """
        room = _MAX_GRANT_BYTES
        host = os.statvfs(self._path)
        if host.f_blocks:  # some file systems do not say how large they are
            kept = int(host.f_blocks * _FREE_FRACTION)
            room = (host.f_bavail - kept) * host.f_frsize
        if self._max_bytes is not None:
            room = min(room, self._max_bytes - used)
        return room

    def _directory_of(self, address: Address, store_id: str) -> str:
        """Return the directory for the entries of an object."""
        name = f"object-{name_hash(f'{store_id} {address.url}')}"
        return os.path.join(self._path, name)  # noqa: PTH118  str paths


def mark_used(entry: UnitFile) -> None:
    """Record that an entry is used now."""
    with suppress(OSError):
        os.utime(entry.path)
