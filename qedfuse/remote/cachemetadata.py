"""The metadata of an entry of the cache: the object's version, and which units readers need."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import secrets
import zlib
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qedfuse.errors import CacheError
from qedfuse.remote.client import Version
from qedfuse.remote.object import MAX_OBJECT_BYTES
from qedfuse.remote.unitfile import open_directory, units_of
from qedfuse.text import printable

if TYPE_CHECKING:
    from qedfuse.remote.unitfile import UnitFile

_NAME: Final = "about.json"
_NEW_NAME: Final = re.compile(r"about(?:-[0-9a-f]{32})?\.new")
"""A file about-RANDOM.new becomes ``about.json`` when it is complete.  Processes that record the
same entry concurrently use different names.  A cache can still have an ``about.new`` of an earlier
version of qedfuse."""
_NO_FILE: Final = (errno.ENOENT, errno.ELOOP, errno.ENXIO)
"""Errors of opening ``about.json`` if it is missing, a symbolic link or a socket."""
_MAX_NEW_FILE_SECONDS: Final = 3600.0
"""Age at which a file about-RANDOM.new was left by a process that was killed."""
_MAX_BYTES: Final = 32 << 20
"""Maximum length of ``about.json`` in bytes.  The units that readers need take up most of it: about
half of this length for an object of the largest size, if they have no pattern."""

_FIRST_SECOND: Final = datetime(1, 1, 1, tzinfo=UTC).timestamp()
_END_SECOND: Final = datetime(9999, 12, 31, tzinfo=UTC).timestamp() + 86_400
"""Limits of the time at which an object was changed last: the first time that is accepted, and the
first that is too late.  Both are in seconds since 1970."""


class EntryMetadata(NamedTuple):
    """The metadata of an entry, which are in its file ``about.json``.

    Attributes:
        version: The version of the object.
        needed: A byte for each unit (block of 256 KiB) of the object: 1 if reads without a server
            need the unit, and 0 if not.  None if they need all units.
    """

    version: Version
    needed: bytes | None


def write_metadata(path: str, shown: str, version: Version) -> None:
    """Write the metadata of a new entry.

    Args:
        path: The directory of the entry.
        shown: The URL of the object without secrets, for people who look into the cache.
        version: The version of the object.

    Raises:
        OSError: A system call failed.
    """
    directory = open_directory(path)
    try:
        _write_file(directory, _NAME, _new_text(shown, version))
    finally:
        os.close(directory)


def read_metadata(path: str) -> EntryMetadata:
    """Return the metadata of the entry ``path``.

    Raises:
        OSError: A system call failed.
        ValueError: The metadata are damaged, or do not match the name of the entry.
    """
    directory = open_directory(path)
    try:
        return _parsed(_read_json(directory), path)
    finally:
        os.close(directory)


def repair_metadata(entry: UnitFile, shown: str, version: Version) -> None:
    """Write the metadata of an entry again if they are missing or damaged; ignore a failure.

    The new metadata have no record of the units that readers need.

    Args:
        entry: The entry.
        shown: The URL of the object without secrets.
        version: The version of the object.
    """
    with suppress(OSError):
        directory = open_directory(entry.path)
        try:
            if entry.is_in(directory) and not _has_metadata(directory, entry.path):
                _replace_json(directory, _new_text(shown, version))
        finally:
            os.close(directory)


def mark_usable_offline(entry: UnitFile, needed: bytes) -> None:
    """Record that an entry has all units that readers need, so it can be used without a server.

    Args:
        entry: The entry.
        needed: A byte for each unit: 1 if readers need the unit, and 0 if they do not.

    Raises:
        HostError: The host is full (`NoSpaceError`).
        CacheError: A system call failed, the record would be too long, or the entry lacks one of
            the units, has damaged metadata, or was removed from the cache.
    """
    shown = printable(entry.path)
    try:
        if not entry.has_units(needed):
            msg = f"{shown}: found units missing, expected all units that readers need"
            raise CacheError(msg)
        packed = base64.b64encode(zlib.compress(needed)).decode()
        directory = open_directory(entry.path)
        try:
            if not entry.is_in(directory):
                msg = f"{shown}: found another entry of this name, expected the open one"
                raise CacheError(msg, errno.ESTALE)
            about = _read_json(directory)
            _parsed(about, entry.path)
            text = _json_text(about | {"needed": packed})
            if len(text) > _MAX_BYTES:
                msg = f"{shown}: {_NAME}: found {len(text)} bytes, expected at most {_MAX_BYTES}"
                raise CacheError(msg, errno.EFBIG)
            _replace_json(directory, text)
        finally:
            os.close(directory)
    except OSError as error:
        raise CacheError.from_os(error, shown, f"record in {_NAME}") from error
    except ValueError as error:
        msg = (
            f"{shown}: {_NAME}: found damaged metadata, expected those of the entry (the "
            "next opening writes them again)"
        )
        raise CacheError(msg) from error


def is_metadata_name(name: str) -> bool:
    """Return whether ``name`` is the name of a file with metadata, complete or not."""
    return name == _NAME or _NEW_NAME.fullmatch(name) is not None


def entry_name(version: Version) -> str:
    """Return the name of the directory for a version."""
    return f"version-{name_hash(f'{version.size} {version.validator}')}"


def name_hash(text: str) -> str:
    """Return the hash of ``text`` for the name of a directory, as 32 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parsed(about: dict[str, Any], path: str) -> EntryMetadata:
    """Return the metadata in the file ``about.json`` of the entry ``path``, or raise ValueError."""
    try:
        found = about["version"]
        version = Version(int(found["size"]), str(found["etag"]), _parsed_time(found["modified"]))
        name = entry_name(version)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(_NAME) from error
    is_possible = 0 <= version.size <= MAX_OBJECT_BYTES
    if not is_possible or name != os.path.basename(path):  # noqa: PTH119  str paths
        raise ValueError(_NAME)
    packed = about.get("needed")
    return EntryMetadata(version, None if packed is None else _unpacked(packed, version.size))


def _parsed_time(modified: object) -> float | None:
    """Return the time of the object's last change, from ``about.json``; see `Version.modified`.

    Only null and times of the years 1 to 9999 are accepted; others raise ValueError or
    OverflowError.  The comparison of the version with the name of the entry finds a damaged time
    only if the object has no entity tag: otherwise the name is made from the tag and not the time.
    """
    if modified is None:
        return None
    if isinstance(modified, bool) or not isinstance(modified, int | float):
        raise ValueError(_NAME)  # noqa: TRY004  damaged data, not a wrong call
    seconds = float(modified)
    # Not `datetime.fromtimestamp`, which raises various errors for other times.
    if not _FIRST_SECOND <= seconds < _END_SECOND:
        raise ValueError(_NAME)
    return seconds


def _unpacked(packed: object, size: int) -> bytes:
    """Return the units of an object of ``size`` bytes that readers need, or raise ValueError."""
    units = units_of(size)
    unpacker = zlib.decompressobj()
    # The limit of the length keeps damaged metadata from filling the memory.
    try:
        needed = unpacker.decompress(base64.b64decode(str(packed), validate=True), units + 1)
    except zlib.error as error:
        raise ValueError(_NAME) from error
    if len(needed) != units or needed.count(0) + needed.count(1) != units:
        raise ValueError(_NAME)
    return needed


def _read_json(directory: int) -> dict[str, Any]:
    """Return the content of ``about.json`` in an open directory; ValueError if it is damaged."""

    def open_safely(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)

    # With an opener, a failing open() closes the descriptor, also that of a directory.
    with open(_NAME, "rb", opener=open_safely) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(_NAME)
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError(_NAME) from error
    if not isinstance(found, dict):
        raise ValueError(_NAME)  # noqa: TRY004  damaged data, not a wrong call
    return found


def _has_metadata(directory: int, path: str) -> bool:
    """Return whether an open directory, that of the entry ``path``, has valid metadata."""
    try:
        _parsed(_read_json(directory), path)
    except ValueError:
        return False
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return False
    return True


def _new_text(shown: str, version: Version) -> bytes:
    """Return the content of the file ``about.json`` of a new entry."""
    return _json_text({"url": shown, "version": asdict(version)})


def _json_text(about: dict[str, Any]) -> bytes:
    """Return the content of a file ``about.json``."""
    return json.dumps(about).encode()


def _replace_json(directory: int, text: bytes) -> None:
    """Replace ``about.json`` in an open directory atomically."""
    new = f"about-{secrets.token_hex(16)}.new"
    try:
        _write_file(directory, new, text)
        _remove_stale(directory, os.stat(new, dir_fd=directory).st_mtime)
        os.rename(new, _NAME, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(new, dir_fd=directory)
        raise


def _remove_stale(directory: int, now: float) -> None:
    """Remove the files that killed processes have left before they became ``about.json``.

    Args:
        directory: A descriptor of the directory of an entry.
        now: The present time of the file system, in seconds since 1970.
    """
    for name in os.listdir(directory):
        if _NEW_NAME.fullmatch(name):
            with suppress(OSError):  # another process has removed or renamed it
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if now - status.st_mtime > _MAX_NEW_FILE_SECONDS:
                    os.unlink(name, dir_fd=directory)


def _write_file(directory: int, name: str, content: bytes) -> None:
    """Write a new file, which only this user can read, in an open directory."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    with open(fd, "wb") as file:  # noqa: PTH123  a descriptor
        file.write(content)
