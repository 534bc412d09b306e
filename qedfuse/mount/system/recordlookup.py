"""Finding the record of a mount, for ``qedfuse umount``, ``stats`` and ``-o remount``."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount.system.mountrecord import MountRecord, has_ended, read_record
from qedfuse.mount.system.recorddirectory import (
    NO_RECORD,
    open_directory,
    record_directories,
    remove_socket,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

_CANNOT_READ: Final = "cannot read the mount record"


class FoundRecord(NamedTuple):
    """A mount record and the path of its file."""

    path: Path
    record: MountRecord


def find_record(device: str, user: int) -> FoundRecord | None:
    """Find the record of a mount, in the directories of the user who has mounted.

    Args:
        device: The device number of the mount, ``MAJOR:MINOR``.
        user: The uid of the user who has mounted.

    Returns:
        The record of the mount, or None.  If several records have the device number, it is the one
        whose server runs, or else that of the latest mount.  Directories to which others than
        ``user`` can write are not searched.

    Raises:
        HostError: A directory or a record cannot be read, and no record of the mount was found.
    """
    records: list[FoundRecord] = []
    failure: HostError | None = None
    for directory in record_directories(user):
        try:
            for found in _records_in(directory, device, user):
                if isinstance(found, FoundRecord):
                    records.append(found)
                else:
                    failure = found
        except PrivilegeError:
            continue
        except OSError as error:
            if error.errno not in NO_RECORD:
                failure = HostError.from_os(error, printable(str(directory)), _CANNOT_READ)
    if failure is not None and not records:
        raise failure
    # The kernel reuses device numbers, so records of earlier mounts may have the same number.
    return max(records, key=_priority, default=None)


def _priority(found: FoundRecord) -> tuple[bool, int, int]:
    """Return the sort key by which the record of the present mount comes last.

    First it counts whether the server runs: the times are those since the boot, and the directory
    may have a record from before it.  The start times of the servers decide only if no mount times
    were recorded: a server may wait for another machine before it mounts, so servers can mount in
    another order than they started.
    """
    try:
        runs = not has_ended(found.record)
    except HostError:
        runs = True  # not known
    return runs, found.record.mounted, found.record.started


def _records_in(directory: Path, device: str, user: int) -> Iterator[FoundRecord | HostError]:
    """Yield the records of a mount in one directory, or an error for each that cannot be read."""
    fd = open_directory(directory, user, make=False)
    try:
        for name in os.listdir(fd):  # noqa: PTH208  of a descriptor
            if name.rpartition(".")[0] != device:
                continue
            try:
                record = read_record(fd, name, user)
            except OSError as error:
                yield HostError.from_os(error, printable(str(directory / name)), _CANNOT_READ)
            else:
                if record is not None:
                    yield FoundRecord(directory / name, record)
    finally:
        os.close(fd)


def take_record(path: Path, user: int) -> MountRecord | None:
    """Read a record that `find_record` has found, remove its file, and return the record.

    Args:
        path: The path of the file.
        user: The user who has mounted.

    Returns:
        The record, even if its file cannot be removed.  None if the file has no valid record any
        more, or if others than ``user`` can write to its directory.

    Raises:
        HostError: The directory or the file cannot be read.
    """
    return _unless_gone(partial(_take, path, user), path)


def open_record_directory(path: Path, user: int) -> int | None:
    """Open the directory of a record that `find_record` has found.

    Args:
        path: The path of the record's file.
        user: The user who has mounted.

    Returns:
        A descriptor of the directory.  None if it is gone, or if others than ``user`` can write to
        it.

    Raises:
        HostError: The directory cannot be opened.
    """
    return _unless_gone(partial(open_directory, path.parent, user, make=False), path)


def _unless_gone(function: Callable[[], T], path: Path) -> T | None:
    """Return the result of a function; None if the record is gone or its directory not private."""
    try:
        return function()
    except PrivilegeError:
        return None
    except OSError as error:
        if error.errno in NO_RECORD:
            return None
        raise HostError.from_os(error, printable(str(path)), _CANNOT_READ) from error


def _take(path: Path, user: int) -> MountRecord | None:
    """Read a record, remove its file, and return the record."""
    fd = open_directory(path.parent, user, make=False)
    try:
        record = read_record(fd, path.name, user)
        if record is not None:
            # The file is removed through the descriptor of its directory.  If root used the path
            # of the file, ``user`` could put a link in place of a directory in the path, and so
            # make root remove a file in another directory.
            remove_socket(fd, path.name)  # a server that was killed leaves its socket
            with contextlib.suppress(OSError):
                os.unlink(path.name, dir_fd=fd)
        return record
    finally:
        os.close(fd)
