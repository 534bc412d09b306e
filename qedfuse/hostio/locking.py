"""Image locking: byte locks that QEMU understands, against concurrent use of an image.

QEMU gives each permission a number i and two bytes of the image file.  A read lock on byte
100 + i means "this opener uses permission i".  A read lock on byte 200 + i means "this opener
denies permission i to all others".  An opener first locks its bytes, and then tests whether another
opener has locked a conflicting byte.  In the other order two openers could both test before either
has locked anything, and both would continue.

The locks belong to the open file description (``F_OFD_SETLK``, fcntl(2)), not to the process.  So
two openers in one process exclude each other, and a child process keeps the locks.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from qedfuse.errors import HostError, ImageInUseError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

_PERMISSIONS: Final = ("consistent read", "write", "write unchanged", "resize")
"""QEMU's names of the permissions, by number."""
_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3

_USES: Final = 100
"""File offset of the byte that an opener locks if it uses permission 0."""
_DENIES: Final = 200
"""File offset of the byte that an opener locks if it denies permission 0 to all others."""

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_BUSY: Final = (errno.EAGAIN, errno.EACCES)
"""Errors of fcntl(2) when another opener holds a conflicting lock."""
_NO_LOCKS: Final = (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of fcntl(2) on a file system without byte locks."""
_MAX_HOLDERS_SHOWN: Final = 3
"""Maximum number of processes that a message names."""


class _Permissions(NamedTuple):
    """The numbers of the permissions that a mode uses, and of those that it denies to others."""

    uses: tuple[int, ...]
    denies: tuple[int, ...]


class LockMode(enum.Enum):
    """What an opener does with a file, and what other openers can do with the file meanwhile.

    The numbers in parentheses are the offsets of the bytes to lock.
    """

    WRITE = "write"
    """Read and change the file; other openers can use it in the mode SHARE only (100, 101, 103,
    201, 203)."""
    READ = "read"
    """Read the file; other openers can read the file too, but cannot change it (100, 201, 203).
    QEMU itself locks only byte 100 of a raw base, which excludes no opener."""
    SHARE = "share"
    """Read the file; another opener can change the file meanwhile (100)."""

    @classmethod
    def to_read(cls, *, share: bool) -> LockMode:
        """Return the mode for reading an image; with ``share`` another opener can write."""
        return cls.SHARE if share else cls.READ

    @property
    def _permissions(self) -> _Permissions:
        if self is LockMode.WRITE:
            return _Permissions((_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE))
        if self is LockMode.SHARE:
            return _Permissions((_CONSISTENT_READ,), ())
        return _Permissions((_CONSISTENT_READ,), (_WRITE, _RESIZE))

    @property
    def taken(self) -> tuple[int, ...]:
        """The file offsets of the bytes that an opener in this mode locks."""
        uses, denies = self._permissions
        return (*(_USES + item for item in uses), *(_DENIES + item for item in denies))

    @property
    def tested(self) -> tuple[int, ...]:
        """The file offsets of the bytes that must not be locked by another opener."""
        uses, denies = self._permissions
        return (*(_DENIES + item for item in uses), *(_USES + item for item in denies))


class Holder(NamedTuple):
    """A process that holds a lock; the name of its command is escaped for messages."""

    pid: int
    command: str

    def __str__(self) -> str:
        """Return the command and the process id, for messages."""
        return f"{self.command} (pid {self.pid})"


def lock_image(fd: int, mode: LockMode, name: str) -> None:
    """Take the locks of ``mode`` on an open file, called ``name`` in messages.

    The locks last as long as the open file description.  On a file system without byte locks a
    warning is logged, and nothing is locked.  After any error no lock of ``mode`` is held.

    Raises:
        ImageInUseError: Another opener holds a conflicting lock; the message names the processes
            that can be identified.
        HostError: The kernel refused for another reason.
    """
    byte = mode.taken[0]
    try:
        for byte in mode.taken:
            _set(fd, fcntl.F_RDLCK, byte)
        for byte in mode.tested:
            found = _conflict(fd, byte)
            if found is not None:
                _refuse(fd, mode, byte, found, name)
    except OSError as error:
        if error.errno in _BUSY:
            # Another program holds a write lock on this byte; QEMU takes read locks only.
            pid = None
            with suppress(OSError):  # without a pid, the processes are searched for in /proc
                pid = _conflict(fd, byte)
            _refuse(fd, mode, byte, pid or 0, name)
        _release(fd, mode)
        if error.errno not in _NO_LOCKS:
            raise HostError.from_os(error, name, "cannot lock") from error
        _log.warning(
            "%s: not locked: the file system has no byte locks (%s); "
            "other programs can open and change the file meanwhile",
            name,
            os.strerror(error.errno),
        )


def _set(fd: int, kind: int, byte: int) -> None:
    """Take (``F_RDLCK``) or drop (``F_UNLCK``) the lock on one byte."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _conflict(fd: int, byte: int) -> int | None:
    """Return the pid of another opener that has locked a byte (-1: unknown); None without one."""
    # Ask for a write lock: a read lock would not conflict with the read locks of other openers.
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    kind, pid = answer[0], answer[4]
    return None if kind == fcntl.F_UNLCK else int(pid)


def _release(fd: int, mode: LockMode) -> None:
    """Drop those locks of a mode that are held."""
    for byte in mode.taken:
        with suppress(OSError):  # for example, the file system has no byte locks
            _set(fd, fcntl.F_UNLCK, byte)


def _refuse(fd: int, mode: LockMode, byte: int, pid: int, name: str) -> NoReturn:
    """Drop the locks of a mode; raise ImageInUseError, which names the holders of the byte.

    If ``pid`` is positive, the message names only the process with this pid.  Otherwise /proc is
    searched for the holders.
    """
    file = _lock_table_name(fd)  # before the release: the name is read from the locks
    _release(fd, mode)
    found = [_holder(pid)] if pid > 0 else list(holders(file, byte))
    # The message uses QEMU's words, so that a web search finds explanations.
    if byte >= _DENIES:
        what = f'"{_PERMISSIONS[byte - _DENIES]}"'
    else:
        what = f'shared "{_PERMISSIONS[byte - _USES]}"'
    names = ", ".join(map(str, found[:_MAX_HOLDERS_SHOWN]))
    more = " and others" if len(found) > _MAX_HOLDERS_SHOWN else ""
    by = f"held by {names}{more}" if found else "held by a process that could not be identified"
    msg = f"{name}: in use: Failed to get {what} lock, {by}"
    raise ImageInUseError(msg)


def _lock_table_name(fd: int) -> str:
    """Return ``MAJOR:MINOR:INODE`` of a file, by which the kernel lists its locks.

    It is read from the locks that were taken through ``fd``.  If there is none, because another
    process had the first one, the numbers are those of fstat(2).  On btrfs and overlayfs the kernel
    lists other numbers, so the holders of locks are not found then.
    """
    own = _locks(_read(Path(f"/proc/self/fdinfo/{fd}")))
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    return next((file for file, _first, _last in own), f"{device}:{status.st_ino}")


def holders(file: str, byte: int) -> Iterator[Holder]:
    """Yield the processes that have locked a byte of a file.

    Slow: reads the descriptors of every process, because ``/proc/locks`` has no pids for OFD locks.

    Args:
        file: The file as ``MAJOR:MINOR:INODE``, from `_lock_table_name`.
        byte: File offset of the byte.
    """
    for process in Path("/proc").glob("[0-9]*"):
        if _holds(process / "fdinfo", file, byte):
            yield _holder(int(process.name))


def _holds(directory: Path, file: str, byte: int) -> bool:
    """Return whether a process has locked a byte, by its ``fdinfo`` directory in /proc."""
    try:
        descriptors = list(directory.iterdir())
    except OSError:  # the process has ended, or belongs to another user
        return False
    return any(
        where == file and first <= byte <= last
        for info in descriptors
        for where, first, last in _locks(_read(info))
    )


def _read(path: Path) -> str:
    """Return the text of a file of /proc; empty if the file cannot be read or is gone."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def _locks(table: str) -> Iterator[tuple[str, int, float]]:
    """Yield the locks of a descriptor from its ``fdinfo``: ``MAJOR:MINOR:INODE``, first, last."""
    for line in table.split("\n"):
        # A line has this form: lock:   1: OFDLCK ADVISORY  READ -1 fe:00:2146329 100 100
        if line.startswith("lock:"):
            file, first, last = line.split()[-3:]
            yield file, int(first), float("inf") if last == "EOF" else int(last)


def _holder(pid: int) -> Holder:
    """Return a process with its command name; the name is "a process" if it cannot be read."""
    command = _read(Path(f"/proc/{pid}/comm")).removesuffix("\n")
    return Holder(pid, printable(command) if command else "a process")
