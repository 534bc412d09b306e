"""Opening a URL as a file of a chain."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qedfuse.errors import CacheError, HostError, RemoteError
from qedfuse.remote.cachedirectory import CacheDirectory, CacheOptions, mark_used
from qedfuse.remote.cacheroot import default_directory
from qedfuse.remote.client import AttemptError, ClientOptions, RefusedError, UnusableError
from qedfuse.remote.fetcher import Fetcher
from qedfuse.remote.localdata import LocalData
from qedfuse.remote.object import RemoteObject, make_client, open_object
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.remote.unconfigured import UnconfiguredClient
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.remote.address import Address
    from qedfuse.remote.client import Client, Version
    from qedfuse.remote.options import RemoteOptions
    from qedfuse.remote.unitfile import UnitFile

_log = logging.getLogger(__name__)

_OUTAGES: Final = (AttemptError, RefusedError)
"""The causes of a failed opening after which an entry of the cache is used instead."""


def open_remote(
    address: Address, options: RemoteOptions, wanted: tuple[int, str] | None = None
) -> RemoteFile:
    """Open the object at an address as a file; the caller closes the file.

    The call blocks until the server answers or the time in ``options`` is over.

    With a complete entry in the cache (see `offline_entries`), failed attempts are repeated for at
    most `Deadlines.connect_seconds`.  If all fail, or the credentials are refused or not valid, the
    entry is used, and a warning is logged.

    Args:
        address: The address.
        options: How to read the object, and where the cache is.
        wanted: Size and validator of the version that the caller expects; None for any version.  A
            complete entry for this version is used even if the server has another version.  Without
            the server, only this version may come from the cache.

    Raises:
        RemoteError: The object is missing or cannot be read.
        CacheError: The directory that ``options`` name cannot be used.
        HostError: The data file of the cache cannot be used.
        UsageError: The address leads to another machine without TLS, which ``options`` do not
            allow.
    """
    client = _make_client(address, client_options(options))
    directory = _open_directory(options)
    version, cache = _offline_entry(directory, address, client, wanted)
    deadlines = options.deadlines
    if cache is not None:
        seconds = min(deadlines.connect_seconds, deadlines.total_seconds)
        deadlines = replace(deadlines, total_seconds=seconds)
    try:
        source = open_object(address, client, deadlines, allow_unpinned=options.allow_unpinned)
    except RemoteError as error:
        if version is None or cache is None or not isinstance(error.__cause__, _OUTAGES):
            if cache is not None:
                cache.close()
            raise _with_stored_part(error, directory, address, client, wanted) from error.__cause__
        _log.warning("%s; reading it from the cache", error)
        mark_used(cache)
    else:
        found = source.version
        if wanted and version and cache and not version.is_same(found):
            _log.warning(
                "%s: found %s, expected %s; reading the expected version from the cache",
                *(address.shown, _shown(found), _shown(version)),
            )
            mark_used(cache)
        else:
            if cache is not None:
                cache.close()
            version = found
            cache = _open_cache(directory, address, version, client)
    source = RemoteObject(address, client, version, options.deadlines)
    local = None
    if cache is not None:
        try:
            local = LocalData(cache)
        except OSError as error:
            cache.close()
            raise HostError.from_os(error, address.shown, "open the cache") from error
    fetcher = Fetcher(source, cache, directory.evict if directory else None)
    return RemoteFile(source, fetcher, local)


def _make_client(address: Address, options: ClientOptions) -> Client:
    """Return a client; if its configuration is not valid, an `UnconfiguredClient`."""
    try:
        return make_client(address, options)
    except RemoteError as error:
        if not isinstance(error.__cause__, UnusableError):
            raise
        with suppress(UnusableError):
            return UnconfiguredClient(address, options, error)
        raise


def client_options(options: RemoteOptions) -> ClientOptions:
    """Return the options for clients that correspond to the options of a user."""
    return ClientOptions(
        connect_seconds=options.deadlines.connect_seconds,
        attempt_seconds=options.deadlines.attempt_seconds,
        allow_http=options.allow_http,
        redirect_prefixes=options.allowed,
        credentials=options.credentials,
        credentials_file=options.credentials_file,
    )


def _open_directory(options: RemoteOptions) -> CacheDirectory | None:
    """Return the directory of the cache; None if there is no cache.

    Without a usable directory the reason is logged.  A default directory on a file system that
    waits for a server (NFS, FUSE) is not used: if the server did not answer, readers would block.

    Raises:
        CacheError: The directory that the user has named cannot be used.
    """
    try:
        path = options.cache_directory or default_directory()
        directory = CacheDirectory(CacheOptions(path, options.cache_bytes))
    except CacheError as error:
        if options.cache_directory is not None:
            raise
        _log.warning("%s; going on without a cache", error)
        return None
    if options.cache_directory is None and directory.waits_for_server():
        shown = printable(path)
        _log.warning("%s: found a network file system; going on without a cache", shown)
        return None
    return directory


def _open_cache(
    directory: CacheDirectory | None, address: Address, version: Version, client: Client
) -> UnitFile | None:
    """Open or make the entry of the cache for a version; None if there is no cache or entry.

    A version of which only the size is known gets no entry: another version may have this size.
    """
    if directory is None or not (version.validator or address.version):
        return None
    try:
        return directory.open_entry(address, version, client.store_id)
    except CacheError as error:
        _log.warning("%s; going on without a cache", error)
        return None


def _offline_entry(
    directory: CacheDirectory | None,
    address: Address,
    client: Client,
    wanted: tuple[int, str] | None,
) -> tuple[Version | None, UnitFile | None]:
    """Return the version and open entry of an object that can be used without a server.

    This is the entry for the version ``wanted``, or the last used one if ``wanted`` is None.  If
    there is no such entry, both are None; or RemoteError is raised if ``client`` is unconfigured.
    """
    if directory is not None:
        for version, entry in directory.offline_entries(address, client.store_id):
            if wanted is None or wanted == (version.size, version.validator):
                return version, entry
            entry.close()
    if isinstance(client, UnconfiguredClient):
        raise client.failure
    return None, None


def _with_stored_part(
    error: RemoteError,
    directory: CacheDirectory | None,
    address: Address,
    client: Client,
    wanted: tuple[int, str] | None,
) -> RemoteError:
    """Return the error of a failed opening, with a note on how much the cache has, if anything."""
    if directory is None or not isinstance(error.__cause__, _OUTAGES):
        return error
    part = directory.stored_part(address, client.store_id, wanted)
    if part is None:
        return error
    stored, size = part
    msg = (
        f"{error}; the cache has {stored} of {size} bytes, too few to read it without the server "
        "(qedimg warm fetches the rest)"
    )
    return RemoteError(msg, error.errno)


def _shown(version: Version) -> str:
    """Return a version for messages."""
    validator = printable(version.validator) if version.validator else "no validator"
    return f"size {version.size} and {validator}"
