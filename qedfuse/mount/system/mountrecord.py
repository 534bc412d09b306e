"""Mount records, by which ``qedfuse umount`` finds the server of a mount.

The server is the process that answers the kernel's requests for the mount.  Each mount has one
record, in a file of its own:

    /run/qedfuse/0:42.1234                 for root
    $XDG_RUNTIME_DIR/qedfuse/0:42.1234     for other users, if this directory can be made or opened
    /run/user/UID/qedfuse/0:42.1234        otherwise, if this directory can be made or opened
    /tmp/qedfuse-UID/0:42.1234             otherwise

The file name is the device number of the mount and the pid of the server.  The mount table
shows the device number even of a mount whose server has ended, or which the caller may not
access.  The pid is needed as well, because the kernel can give the device number to a new mount
while the server of the old one is still closing its images.

The server removes its record when all images are safely closed.  If something failed, the
server writes the reason into the record instead.  If the server is killed, its record stays
unchanged.  The record of a failed or killed server is removed by ``qedfuse umount``, which reports
the failure, or by a later mount of the same user (`MountRecordFile`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount.system.mounttable import read_mounts
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_NEW_SUFFIX: Final = ".new"
"""The end of a file's name while a record is written to the file."""
_CANNOT_READ: Final = "cannot read the mount record"
_MAX_RECORD_BYTES: Final = 1 << 20
"""Maximum number of bytes that are read of a record; a longer record is not valid."""
_MAX_PID: Final = 1 << 22
_MAX_TICKS: Final = (1 << 64) - 1
_MAX_EXIT_CODE: Final = 255
_ENDED_MODE: Final = 0o400
"""The mode that marks a record whose server has ended and whose mount is gone."""
_MIN_ENDED_SECONDS: Final = 60.0
"""Minimum time for which a record with `_ENDED_MODE` is kept, because a running ``qedfuse
umount`` may still need the record."""
_NO_RECORD: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""The errors of open(2) for a directory or a file that is missing or of the wrong type.  After any
other error there may be a record that cannot be read."""


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a server records about its mount; the fields are the keys of a JSON object.

    Attributes:
        pid: The pid of the server.
        started: When the server started, in clock ticks since boot.  The start time distinguishes
            the server from a later process with the same pid.  0 if unknown; then every process
            with the pid counts as the server.
        mountpoint: The mountpoint.
        sources: The images.
        failure: What failed during the mount or at its end; None while the server is running, or
            if it was killed.
        exit_code: The exit code of the server; 0 if ``failure`` is None.
        options: All mount options, each as for ``-o``, with absolute paths; empty in a record of
            an earlier version of qedfuse.
    """

    pid: int
    started: int
    mountpoint: str
    sources: tuple[str, ...]
    failure: str | None = None
    exit_code: int = 0
    options: tuple[str, ...] = ()


class FoundRecord(NamedTuple):
    """A mount record and the path of its file."""

    path: Path
    record: MountRecord


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot.

    The result is None if /proc shows no process with the pid.

    Raises:
        HostError: The start time cannot be read for another reason.
    """
    path = f"/proc/{pid}/stat"
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise HostError.from_os(error, path, "cannot read") from error
    # The fields (proc_pid_stat(5)) are counted from the last parenthesis, which ends the name,
    # because the name may contain spaces and parentheses.
    return int(text.rpartition(")")[2].split()[19])


def has_ended(record: MountRecord) -> bool:
    """Return whether the server that wrote a record has ended.

    Raises:
        HostError: The start time of the process with the server's pid cannot be read.
    """
    start = process_start(record.pid)
    return start is None or record.started not in (0, start)


def record_directories(user: int) -> list[Path]:
    """List the directories in which records of a user's mounts may be, the preferred one first.

    The environment variable ``XDG_RUNTIME_DIR`` counts only for the user of this process.
    """
    if user == 0:
        return [Path("/run/qedfuse")]
    directories = [
        Path(f"/run/user/{user}/qedfuse"),
        Path(f"/tmp/qedfuse-{user}"),  # noqa: S108  its owner and mode are checked before use
    ]
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own and user == os.getuid():
        directories.insert(0, Path(own) / "qedfuse")
    return directories


def _open_directory(path: Path, user: int, *, make: bool) -> int:
    """Open a directory of records, if only ``user`` can write to the directory.

    Args:
        path: The directory.
        user: The user who must own the directory.
        make: Whether to make the directory if it is missing.

    Returns:
        A descriptor of the directory.

    Raises:
        OSError: The directory cannot be made or opened, or the path is no directory.
        PrivilegeError: The directory has another owner, or others can write to it.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(fd)
    if status.st_uid != user or stat.S_IMODE(status.st_mode) & 0o022:
        os.close(fd)
        msg = (
            f"{printable(path)}: found a directory of another user, or to which others can write, "
            "expected a directory of this user, to which no other can write"
        )
        raise PrivilegeError(msg)
    return fd


class MountRecordFile:
    """The file with the record of one mount, from before the mount until after its end.

    The caller must construct the object before the mount exists, because the constructor opens
    the directory of the record, and later the path of this directory may lead through the mount.
    """

    def __init__(self) -> None:
        """Open a directory of records, and remove old records of servers that have ended.

        If old records cannot be read or removed, they are left to a later mount.

        Raises:
            HostError: No directory of records can be made or opened.
            PrivilegeError: The first directory of records that can be opened has another owner,
                or others can write to it.
        """
        self._written: tuple[str, MountRecord] | None = None
        self._directory = self._open_first_usable()
        with contextlib.suppress(OSError, HostError):
            _remove_stale(self._directory)

    def write(self, device: str, record: MountRecord) -> None:
        """Write the record of a mount.

        Args:
            device: The device number of the mount, ``MAJOR:MINOR``.
            record: The record.

        Raises:
            HostError: The record cannot be written.
        """
        name = f"{device}.{record.pid}"
        self._write(name, record)
        self._written = (name, record)

    @staticmethod
    def _open_first_usable() -> int:
        """Open the first of `record_directories` that can be made or opened.

        Raises:
            HostError: None of them can be made or opened.
            PrivilegeError: The first that can be opened has another owner, or others can write
                to it.  A later directory is not tried.
        """
        user = os.geteuid()
        failure: OSError | None = None
        for path in record_directories(user):
            try:
                return _open_directory(path, user, make=True)
            except OSError as error:
                failure = error
        raise HostError.from_os(failure or OSError(), str(path), "cannot write the mount record")

    def _write(self, name: str, record: MountRecord) -> None:
        """Write the file ``name`` with a record.

        The file is replaced atomically, so a reader sees the complete old or new content.

        Raises:
            HostError: The file cannot be written; an earlier file ``name`` is unchanged.
        """
        text = json.dumps(asdict(record)).encode()
        new = name + _NEW_SUFFIX
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(new, flags, 0o600, dir_fd=self._directory)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(text)
            os.rename(new, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=self._directory)
            raise HostError.from_os(error, name, "cannot write the mount record") from error

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Remove the record, or add a failure to it; then close the directory.

        Nothing is removed or added if no record was written.  An error of the host is ignored.

        Args:
            failure: What failed; None if nothing failed, and the record must be removed.
            exit_code: The exit code of the server, recorded with the failure.
        """
        try:
            if self._written is None:
                return
            name, record = self._written
            if failure is None:
                os.unlink(name, dir_fd=self._directory)
            else:
                self._write(name, replace(record, failure=failure, exit_code=exit_code))
        except (OSError, HostError):
            pass  # the mount is gone, so no caller could act on the error
        finally:
            os.close(self._directory)


def find_record(device: str, user: int) -> FoundRecord | None:
    """Find the record of a mount, in the directories of the user who has mounted.

    Args:
        device: The device number of the mount, ``MAJOR:MINOR``.
        user: The user who has mounted.

    Returns:
        The record; if there are several, that of the server that started last.  None if there is
        no record in a directory to which only ``user`` can write.

    Raises:
        HostError: A directory or a record cannot be read, and no other record was found.
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
            if error.errno not in _NO_RECORD:
                failure = HostError.from_os(error, printable(str(directory)), _CANNOT_READ)
    if failure is not None and not records:
        raise failure
    # The kernel reuses device numbers, so there may be records of earlier mounts with the same
    # number.  Normally the server that started last has also mounted last.
    return max(records, key=lambda found: found.record.started, default=None)


def _records_in(directory: Path, device: str, user: int) -> Iterator[FoundRecord | HostError]:
    """Yield the records of a mount in one directory, or an error for each that cannot be read.

    Args:
        directory: The directory.
        device: The device number of the mount, ``MAJOR:MINOR``.
        user: The user who has mounted.

    Raises:
        OSError: The directory is missing or cannot be read.
        PrivilegeError: The directory has another owner, or others can write to it.
    """
    fd = _open_directory(directory, user, make=False)
    try:
        for name in os.listdir(fd):  # noqa: PTH208  of a descriptor
            if name.rpartition(".")[0] != device:
                continue
            try:
                record = _read(fd, name, user)
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
        The record, even if its file cannot be removed.  None if the file is gone or has no valid
        record any more, or if others than ``user`` can write to its directory; then nothing is
        removed.

    Raises:
        HostError: The directory or the file cannot be read.
    """
    try:
        return _take(path, user)
    except PrivilegeError:
        return None
    except OSError as error:
        if error.errno in _NO_RECORD:
            return None
        raise HostError.from_os(error, printable(str(path)), _CANNOT_READ) from error


def _take(path: Path, user: int) -> MountRecord | None:
    """Read a record, remove its file, and return the record, as `take_record` does.

    Raises:
        OSError: The directory is missing, or the directory or the file cannot be read.
        PrivilegeError: The directory has another owner, or others can write to it.
    """
    fd = _open_directory(path.parent, user, make=False)
    try:
        record = _read(fd, path.name, user)
        if record is not None:
            # The file is removed through the descriptor of its directory.  If root used the path
            # of the file, ``user`` could put a link in place of a directory in the path, and so
            # make root remove a file in another directory.
            with contextlib.suppress(OSError):
                os.unlink(path.name, dir_fd=fd)
        return record
    finally:
        os.close(fd)


def _remove_stale(directory: int) -> None:
    """Remove records of servers that have ended, unless a ``qedfuse umount`` may need them.

    The mount of a killed server stays in the mount table until the mount is unmounted, and the
    record must stay until then.  After the unmount, ``qedfuse umount`` waits for the end of the
    server and reads the record once more.  So a record whose mount is gone is first made
    read-only, and the first mount that begins at least a minute later removes the record.  Mounts
    that are only in other mount namespaces count as gone.

    If a server was killed while it wrote its record, the unfinished file is removed as well.

    Args:
        directory: A descriptor of the directory of records.

    Raises:
        OSError: The directory or the mount table cannot be read.
        HostError: /proc is not mounted.
    """
    user = os.geteuid()
    ended = []
    for name in os.listdir(directory):
        with contextlib.suppress(OSError, HostError):  # a record that cannot be read stays
            if name.endswith(_NEW_SUFFIX):
                _remove_unfinished(directory, name)
            elif (record := _read(directory, name, user)) is not None and has_ended(record):
                ended.append(name)
    # The mount table is read after the records.  A server writes its record after it has
    # mounted, so a record whose mount is missing in this table belongs to a mount that is gone.
    mounted = {entry.device for entry in read_mounts()}
    for name in ended:
        if name.partition(".")[0] in mounted:
            continue
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_IMODE(status.st_mode) != _ENDED_MODE:
                os.chmod(name, _ENDED_MODE, dir_fd=directory)
            elif time.time() - status.st_ctime >= _MIN_ENDED_SECONDS:
                os.unlink(name, dir_fd=directory)


def _remove_unfinished(directory: int, name: str) -> None:
    """Remove the unfinished file of a record, unless its server may still be writing it.

    Args:
        directory: A descriptor of the directory of records.
        name: The name of the file, which ends in `_NEW_SUFFIX`.

    Raises:
        OSError: The file cannot be removed.
        HostError: The start time of the process with the server's pid cannot be read.
    """
    pid = name.removesuffix(_NEW_SUFFIX).rpartition(".")[2]
    if re.fullmatch("[0-9]{1,10}", pid) and process_start(int(pid)) is None:
        os.unlink(name, dir_fd=directory)


def _read(directory: int, name: str, user: int) -> MountRecord | None:
    """Read the record in the file ``name`` of a directory.

    The result is None unless the file is a regular file of ``user`` with a valid record.

    Raises:
        OSError: The file may have a valid record, but cannot be opened or read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in _NO_RECORD:
            return None
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != user:
            return None
        return _parse(os.read(fd, _MAX_RECORD_BYTES))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    finally:
        os.close(fd)


def _parse(text: bytes) -> MountRecord:
    """Parse the text of a record.

    The text is untrusted, because root reads the records of all users.

    Raises:
        ValueError: The text is not JSON.
        KeyError: The field ``sources`` is missing.
        TypeError: The text is no JSON object, another required field is missing, a field is
            unknown, or a field has a wrong type or an impossible value.
        RecursionError: The text is nested too deeply.
    """
    data = json.loads(text)
    # Earlier versions of qedfuse wrote no options.
    lists = {"sources": data["sources"], "options": data.get("options", [])}
    record = MountRecord(**{**data, **{name: tuple(items) for name, items in lists.items()}})
    if not (
        all(type(items) is list for items in lists.values())
        and all(type(item) is str for items in lists.values() for item in items)
        and type(record.mountpoint) is str
        and type(record.failure) in (str, type(None))
        and _is_number(record.pid, 1, _MAX_PID)
        and _is_number(record.started, 0, _MAX_TICKS)
        and _is_number(record.exit_code, 0, _MAX_EXIT_CODE)
    ):
        msg = "expected a mount record"
        raise TypeError(msg)
    return record


def _is_number(value: object, minimum: int, maximum: int) -> bool:
    """Return whether a value is an integer, and no boolean, from ``minimum`` to ``maximum``."""
    return type(value) is int and minimum <= value <= maximum
