"""The metadata of an entry of the cache: the object's version, and which units readers need."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qedfuse.remote.client import Version
from qedfuse.remote.unitfile import open_directory, units_of

if TYPE_CHECKING:
    from qedfuse.remote.unitfile import UnitFile

_NAME: Final = "about.json"
_NEW_NAME: Final = "about.new"
METADATA_NAMES: Final = frozenset({_NAME, _NEW_NAME})
"""The names of the files with metadata; ``about.new`` is renamed to ``about.json`` when it is
complete."""
_MAX_BYTES: Final = 1 << 20
"""How many bytes of ``about.json`` are read; a longer file counts as damaged."""


class EntryMetadata(NamedTuple):
    """The metadata of an entry, which are in its file ``about.json``.

    Attributes:
        version: The version of the object.
        needed: A byte for each unit: 1 if the entry must have the unit to be used without a server,
            and 0 otherwise.  None if the entry must have all units.
    """

    version: Version
    needed: bytes | None


def write_metadata(path: str, shown: str, version: Version) -> None:
    """Write the metadata of a new entry, whose directory is ``path``.

    Args:
        path: The directory.
        shown: The URL of the object without secrets, for people who look into the cache.
        version: The version of the object.

    Raises:
        OSError: The host refused.
    """
    directory = open_directory(path)
    try:
        _write_json(directory, _NAME, {"url": shown, "version": asdict(version)})
    finally:
        os.close(directory)


def read_metadata(path: str) -> EntryMetadata:
    """Return the metadata of the entry ``path``.

    Raises:
        OSError: The host refused.
        ValueError: The metadata are damaged, or do not match the name of the entry.
    """
    directory = open_directory(path)
    try:
        return _parsed(_read_json(directory), path)
    finally:
        os.close(directory)


def mark_usable_offline(entry: UnitFile, needed: bytes) -> bool:
    """Record that an entry has all units that readers need; return whether it was recorded.

    Nothing is recorded if the entry lacks one of these units.  If the entry loses one of them
    later, the entry cannot be used without a server until it has the unit again.  If the entry was
    removed from the cache, nothing is recorded, even if another entry has its name now.

    Args:
        entry: The entry.
        needed: A byte for each unit: 1 if readers need the unit, and 0 if they do not.
    """
    try:
        if not entry.has_units(needed):
            return False
        packed = base64.b64encode(zlib.compress(needed)).decode()
        directory = open_directory(entry.path)
        try:
            if not entry.is_in(directory):
                return False
            about = _read_json(directory)
            _parsed(about, entry.path)
            with suppress(FileNotFoundError):
                os.unlink(_NEW_NAME, dir_fd=directory)
            _write_json(directory, _NEW_NAME, about | {"needed": packed})
            os.rename(_NEW_NAME, _NAME, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            os.close(directory)
    except (OSError, ValueError):
        return False
    return True


def entry_name(version: Version) -> str:
    """Return the name of the directory for a version."""
    return f"version-{name_hash(f'{version.size} {version.validator}')}"


def name_hash(text: str) -> str:
    """Return the hash of ``text`` for the name of a directory, as 32 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parsed(about: dict[str, Any], path: str) -> EntryMetadata:
    """Return the metadata in the file ``about.json`` of the entry ``path``.

    Raises:
        ValueError: The metadata are damaged, or do not match the name of the entry.
    """
    try:
        found = about["version"]
        modified = found["modified"]
        # If there is an entity tag, the time is not in the entry's name, so the comparison below
        # does not find a wrong time.  Therefore the conversion to float must refuse other types.
        modified = None if modified is None else float(modified)
        version = Version(int(found["size"]), str(found["etag"]), modified)
        name = entry_name(version)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(_NAME) from error
    if version.size < 0 or name != os.path.basename(path):  # noqa: PTH119  str paths
        raise ValueError(_NAME)
    packed = about.get("needed")
    return EntryMetadata(version, None if packed is None else _unpacked(packed, version.size))


def _unpacked(packed: object, size: int) -> bytes:
    """Return the units that readers need of an object of ``size`` bytes; see `EntryMetadata`.

    Args:
        packed: The text in the file ``about.json``.
        size: The size of the object, which limits the memory.

    Raises:
        ValueError: The text is damaged.
    """
    units = units_of(size)
    unpacker = zlib.decompressobj()
    try:
        needed = unpacker.decompress(base64.b64decode(str(packed), validate=True), units + 1)
    except zlib.error as error:
        raise ValueError(_NAME) from error
    if len(needed) != units or needed.count(0) + needed.count(1) != units:
        raise ValueError(_NAME)
    return needed


def _read_json(directory: int) -> dict[str, Any]:
    """Return the content of the file ``about.json`` of the entry in an open directory.

    Raises:
        OSError: The host refused.
        ValueError: The file is no JSON object.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(_NAME, flags, dir_fd=directory)
    with open(fd, "rb") as file:  # noqa: PTH123  a descriptor
        content = file.read(_MAX_BYTES)
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError(_NAME) from error
    if not isinstance(found, dict):
        raise ValueError(_NAME)  # noqa: TRY004  damaged data, not a wrong call
    return found


def _write_json(directory: int, name: str, about: dict[str, Any]) -> None:
    """Write a new file, which only this user can read, in an open directory.

    Raises:
        OSError: The host refused.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    with open(fd, "w", encoding="utf-8") as file:  # noqa: PTH123  a descriptor
        file.write(json.dumps(about))
