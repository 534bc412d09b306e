"""A record of each mount, by which ``qedfuse umount`` finds the process that serves it.

    /run/qedfuse/0:42.1234       for root
    $XDG_RUNTIME_DIR/qedfuse/    for users, or /tmp/qedfuse-UID/ if that is not set

The file name is the device number of the mount and the pid of the process.  The mount table
shows the device number even of a mount that is dead or may not be accessed.  The pid is
needed as well, because the kernel reuses the device number while the process is still
closing its images.  The process removes its record when all images are safely closed.  If
something failed at the end, it writes the reason into the record instead.  If it is killed,
the record stays as it was.  `MountRecordFile` removes old records.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount.system.mounttable import read_mounts
from qedfuse.text import printable

_MAX_RECORD_BYTES: Final = 1 << 20
_MAX_PID: Final = 1 << 22
_MAX_TICKS: Final = (1 << 64) - 1
_MAX_EXIT_CODE: Final = 255
_ENDED_MODE: Final = 0o400
"""The mode of a record whose process was found to have ended."""
_MIN_ENDED_SECONDS: Final = 60.0
"""Shortest time for which such a record is kept, since a ``qedfuse umount`` may be running."""


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a process records about the mount that it serves; the fields are JSON keys.

    Attributes:
        pid: The process.
        started: When the process started, in clock ticks since boot: pids are reused.
        mountpoint: The mountpoint.
        sources: The images.
        failure: What failed at the end of the mount; None if nothing did.
        exit_code: The exit code of the process if something failed.
        options: All mount options, each as for ``-o``, with absolute paths.
    """

    pid: int
    started: int
    mountpoint: str
    sources: tuple[str, ...]
    failure: str | None = None
    exit_code: int = 0
    options: tuple[str, ...] = ()


class FoundRecord(NamedTuple):
    """A mount record and its file."""

    path: Path
    record: MountRecord


def process_start(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if there is no process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # Fields are counted from the end of the name, which may contain spaces and parentheses.
    return int(text.rpartition(")")[2].split()[19])


def record_directories(user: int) -> list[Path]:
    """List the directories in which records of a user's mounts may be, the preferred one first."""
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
    """Open a directory of records, if only ``user`` can write to it.

    Args:
        path: The directory.
        user: The user who must own it.
        make: Whether to make it if it is missing.

    Returns:
        A descriptor of the directory.

    Raises:
        OSError: It is missing, and could not be made.
        PrivilegeError: It has another owner, or others can write to it.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if found.st_uid != user or stat.S_IMODE(found.st_mode) & 0o022:
        os.close(fd)
        msg = (
            f"{printable(path)}: found a directory that others can write to, expected a private one"
        )
        raise PrivilegeError(msg)
    return fd


class MountRecordFile:
    """Writes the record of one mount and removes it at the end.

    The constructor opens the directory, before the mount exists: later the path of the
    directory may lead through the mount.
    """

    def __init__(self) -> None:
        """Open the directory of records, and remove old records of processes that were killed.

        Raises:
            HostError: There is no such directory and none can be made.
            PrivilegeError: Other users can write to the directory.
        """
        self._written: tuple[str, MountRecord] | None = None
        self._directory = self._open_first_usable()
        _remove_stale(self._directory)

    def write(self, device: str, record: MountRecord) -> None:
        """Write the record of the mount with the device number ``device``.

        Raises:
            HostError: It cannot be written.
        """
        name = f"{device}.{record.pid}"
        self._write(name, record)
        self._written = (name, record)

    @staticmethod
    def _open_first_usable() -> int:
        """Open the first of `record_directories` that exists or can be made."""
        user = os.geteuid()
        failure: OSError | None = None
        for path in record_directories(user):
            try:
                return _open_directory(path, user, make=True)
            except OSError as error:
                failure = error
        raise HostError.from_os(failure or OSError(), str(path), "cannot write the mount record")

    def _write(self, name: str, record: MountRecord) -> None:
        """Write the file of the record atomically: readers see the old content or the new."""
        text = json.dumps(asdict(record)).encode()
        new = name + ".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(new, flags, 0o600, dir_fd=self._directory)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(text)
            os.rename(new, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            raise HostError.from_os(error, name, "cannot write the mount record") from error

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Remove the record if it was written; after a failure, add the reason to it instead."""
        try:
            if self._written is None:
                return
            name, record = self._written
            if failure is None:
                os.unlink(name, dir_fd=self._directory)
            else:
                self._write(name, replace(record, failure=failure, exit_code=exit_code))
        except (OSError, HostError):
            pass  # the mount is gone in any case, and there is no caller to report to
        finally:
            os.close(self._directory)


def find_record(device: str, user: int) -> FoundRecord | None:
    """Find the record of a mount that ``user`` has made; None if there is no trusted one."""
    found = []
    for directory in record_directories(user):
        try:
            opened = _open_directory(directory, user, make=False)
        except (OSError, PrivilegeError):
            continue
        try:
            for name in os.listdir(opened):  # noqa: PTH208  of a descriptor
                if name.rpartition(".")[0] == device and (record := _read(opened, name, user)):
                    found.append(FoundRecord(directory / name, record))  # noqa: PERF401  two conditions
        finally:
            os.close(opened)
    # Device numbers are reused: an older record with this number is of a mount that is gone.
    return max(found, key=lambda one: one.record.started, default=None)


def take_record(path: Path, user: int) -> MountRecord | None:
    """Read and remove a record found by `find_record`; None if it is gone."""
    try:
        opened = _open_directory(path.parent, user, make=False)
    except (OSError, PrivilegeError):
        return None
    try:
        record = _read(opened, path.name, user)
        if record is not None:
            # By the descriptor: the user may put another directory in place of this one.
            with contextlib.suppress(OSError):
                os.unlink(path.name, dir_fd=opened)
        return record
    finally:
        os.close(opened)


def _remove_stale(directory: int) -> None:
    """Remove the records of processes that have ended and that ``qedfuse umount`` cannot need.

    The mount of a killed process stays in the mount table until it is unmounted, and the
    record stays as long.  ``qedfuse umount`` reads the record once more after that, when the
    process has ended.  So a record without mount is first made read-only, and removed by a
    mount that starts at least a minute later.  Mounts in other mount namespaces do not count.
    """
    user = os.geteuid()
    ended = []
    for name in os.listdir(directory):
        record = _read(directory, name, user)
        if record is not None and process_start(record.pid) != record.started:
            ended.append(name)
    # Read after the records: then it has the mount of each of them, unless that is gone.
    mounted = {entry.device for entry in read_mounts()}
    for name in ended:
        if name.partition(".")[0] in mounted:
            continue
        with contextlib.suppress(OSError):
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_IMODE(found.st_mode) != _ENDED_MODE:
                os.chmod(name, _ENDED_MODE, dir_fd=directory)
            elif time.time() - found.st_ctime >= _MIN_ENDED_SECONDS:
                os.unlink(name, dir_fd=directory)


def _read(directory: int, name: str, user: int) -> MountRecord | None:
    """Read a record; None unless it is a valid record in a regular file of ``user``."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(name, flags, dir_fd=directory)
    except OSError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != user:
            return None
        try:
            return _parse(file.read(_MAX_RECORD_BYTES))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None


def _parse(text: bytes) -> MountRecord:
    """Parse the text of a record, which is untrusted: root reads records of any user.

    Raises:
        ValueError: It is not JSON.
        TypeError: It is no object, or a field has a wrong type or an impossible value.
        KeyError: A field is missing.
        RecursionError: It is nested too deeply.
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


def _is_number(value: object, least: int, most: int) -> bool:
    """Return whether a value is an integer, and not a boolean, between two bounds."""
    return type(value) is int and least <= value <= most
