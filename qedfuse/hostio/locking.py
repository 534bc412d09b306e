"""Who else has the image open: byte locks that QEMU understands.

QEMU gives each permission a number and two bytes of the image file.  A read lock on byte
100 + i says "I use permission i"; one on byte 200 + i says "I let nobody else use it".
Everybody first takes the bytes that describe what he does and then looks whether anybody
holds a byte that speaks against it.  In the other order two openers could both look
before either has taken anything, and both go on.

The locks belong to the open file description (``F_OFD_SETLK``), not to the process:
another descriptor of the same file may be closed without losing them, two opens in one
process exclude each other, and a child keeps what its parent took.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from qedfuse.errors import HostError, ImageInUseError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)

_PERMISSIONS: Final = ("consistent read", "write", "write unchanged", "resize")
"""QEMU's names, at the index that is the permission's number."""
_CONSISTENT_READ: Final = 0
_WRITE: Final = 1
_RESIZE: Final = 3

_USES: Final = 100
"""The byte of permission 0 for "I use it"."""
_DENIES: Final = 200
"""The byte of permission 0 for "I let nobody else use it"."""

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_BUSY: Final = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS: Final = (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_MOST_HOLDERS: Final = 3  # a longer list helps nobody


class _Bytes(NamedTuple):
    """Permissions that a mode uses, and those that it denies to everybody else."""

    uses: tuple[int, ...]
    denies: tuple[int, ...]


class LockMode(enum.Enum):
    """What an opener does with a file and what he lets others do with it meanwhile."""

    WRITE = "write"
    """Read and change it; others must stay out (bytes 100, 101, 103, 201, 203)."""
    READ = "read"
    """Read it; others may read too, but not change it (bytes 100, 201, 203)."""
    SHARE = "share"
    """Read it beside a writer (byte 100)."""
    BASE = "base"
    """Read it as a raw base (as READ; QEMU holds byte 100 only, which stops no writer)."""

    @classmethod
    def to_read(cls, *, share: bool) -> LockMode:
        """Return the mode for reading an image, with ``share`` beside a writer."""
        return cls.SHARE if share else cls.READ

    @property
    def _bytes(self) -> _Bytes:
        if self is LockMode.WRITE:
            return _Bytes((_CONSISTENT_READ, _WRITE, _RESIZE), (_WRITE, _RESIZE))
        if self is LockMode.SHARE:
            return _Bytes((_CONSISTENT_READ,), ())
        return _Bytes((_CONSISTENT_READ,), (_WRITE, _RESIZE))

    @property
    def taken(self) -> tuple[int, ...]:
        """The bytes that this mode holds, as file offsets."""
        uses, denies = self._bytes
        return (*(_USES + item for item in uses), *(_DENIES + item for item in denies))

    @property
    def tested(self) -> tuple[int, ...]:
        """The bytes that nobody else may hold, as file offsets."""
        uses, denies = self._bytes
        return (*(_DENIES + item for item in uses), *(_USES + item for item in denies))


class Holder(NamedTuple):
    """A process that holds a lock."""

    pid: int
    command: str

    def __str__(self) -> str:
        """Name the process as messages do."""
        return f"{self.command} (pid {self.pid})"


def lock_image(fd: int, mode: LockMode, name: str) -> None:
    """Take the locks of ``mode`` on an open file, called ``name`` in messages.

    They last as long as the open file description.  Where the file system knows no
    locks, a warning is logged and nothing is locked.

    Raises:
        ImageInUseError: Somebody holds a lock that speaks against it; the message names
            him where the kernel tells.  No lock is left behind.
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
            # Somebody has a write lock on a byte.  QEMU never does that.
            _refuse(fd, mode, byte, _conflict(fd, byte) or 0, name)
        _release(fd, mode)
        if error.errno not in _NO_LOCKS:
            raise HostError.from_os(error, name, "cannot lock") from error
        _log.warning(
            "%s: not locked: the file system has no byte locks (%s); "
            "nothing keeps other programs from opening it",
            name,
            os.strerror(error.errno),
        )


def _set(fd: int, kind: int, byte: int) -> None:
    """Take or drop the lock on one byte."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _conflict(fd: int, byte: int) -> int | None:
    """Ask who holds a byte: his pid, -1 if he locked as we do, None if nobody does."""
    # Testing for a write lock finds everybody else's read locks.
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    kind, pid = answer[0], answer[4]
    return None if kind == fcntl.F_UNLCK else int(pid)


def _release(fd: int, mode: LockMode) -> None:
    """Drop all locks of a mode, as far as there are any."""
    for byte in mode.taken:
        try:
            _set(fd, fcntl.F_UNLCK, byte)
        except OSError:  # then there was none: the file system has no locks
            return


def _refuse(fd: int, mode: LockMode, byte: int, pid: int, name: str) -> NoReturn:
    """Let go of everything and say who is in the way."""
    place = _place(fd)
    _release(fd, mode)
    found = [_holder(pid)] if pid > 0 else list(holders(place, byte))
    # The words are QEMU's, so that a search for them finds its explanations too.
    if byte >= _DENIES:
        what = f'"{_PERMISSIONS[byte - _DENIES]}"'
    else:
        what = f'shared "{_PERMISSIONS[byte - _USES]}"'
    by = ", ".join(map(str, found[:_MOST_HOLDERS]))
    more = " and others" if len(found) > _MOST_HOLDERS else ""
    whom = f"held by {by}{more}" if found else "held by a process that cannot be seen from here"
    msg = f"{name}: in use: Failed to get {what} lock, {whom}"
    raise ImageInUseError(msg)


def _place(fd: int) -> str:
    """Give the device and inode of a file as the kernel's lock tables write them.

    Our own locks show it.  The file's attributes would not do: on btrfs and overlayfs
    they name another device than the lock table does.
    """
    own = _locks(_read(Path(f"/proc/self/fdinfo/{fd}")))
    return next((place for place, _first, _last in own), "")


def holders(place: str, byte: int) -> Iterator[Holder]:
    """Find the processes that hold a lock over a byte of the file at ``place``.

    Reads the descriptors of every process that we may look at, so it is for error
    messages only.  ``place`` is ``MAJOR:MINOR:INODE``, as in ``/proc/locks``; that file
    itself does not help, since it lists these locks with a pid of -1.
    """
    if not place:
        return
    for process in Path("/proc").glob("[0-9]*"):
        if _holds(process / "fdinfo", place, byte):
            yield _holder(int(process.name))


def _holds(directory: Path, place: str, byte: int) -> bool:
    """Tell whether one process holds a lock over the byte."""
    try:
        descriptors = list(directory.iterdir())
    except OSError:  # it has ended, or is another user's
        return False
    return any(
        where == place and first <= byte <= last
        for info in descriptors
        for where, first, last in _locks(_read(info))
    )


def _read(path: Path) -> str:
    """Read a small file of /proc; what it was about may have gone meanwhile."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def _locks(table: str) -> Iterator[tuple[str, int, float]]:
    """List the locks of one descriptor: place, first byte, last byte."""
    for line in table.split("\n"):
        # lock:   1: OFDLCK ADVISORY  READ -1 fe:00:2146329 100 100
        if line.startswith("lock:"):
            place, first, last = line.split()[-3:]
            yield place, int(first), float("inf") if last == "EOF" else int(last)


def _holder(pid: int) -> Holder:
    """Name a process."""
    command = _read(Path(f"/proc/{pid}/comm")).removesuffix("\n")
    return Holder(pid, printable(command) or "a process")
