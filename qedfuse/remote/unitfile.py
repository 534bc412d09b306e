"""A file of the cache: the content of one version of an object, as far as it was fetched.

The content is divided into *units* of 256 KiB, each with a checksum in a second file, the map.  A
unit counts only after its bytes were read and compared with the checksum in this process, and again
whenever its bytes have left the page cache (`qedfuse.remote.localdata`).  So nothing needs an order
of writes, a datasync or a journal: what a crash, a full disk, a failed write or another program has
damaged differs from its checksum, and is fetched again.

The data file is one byte longer than the object, and nothing writes that byte.  So a file that was
cut while it is in use never has its length again, although later writes leave holes in it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
import zlib
from typing import TYPE_CHECKING, Final, Self

from qedfuse.hostio.regular import allocated_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from qedfuse.hostio.hostfile import Buffer

UNIT_BYTES: Final = 1 << 18
"""Bytes in a unit.  At 20 ms to the first byte and 80 MiB/s for each connection, a request of 4 KiB
takes 20 ms and one of 256 KiB takes 23 ms."""

_MAP_ENTRY: Final = struct.Struct("<II")
_PRESENT: Final = 0x51454455
"""Marks an entry of the map in use, so that a hole of the map is no checksum."""

_UNWRITTEN_BYTES: Final = 1
"""Bytes at the end of the data file that are never written."""

DATA_NAME: Final = "data"
MAP_NAME: Final = "map"


class UnitFile:
    """The data and the map of one entry of the cache, shared by processes.

    Two processes that fetch the same unit write the same bytes, so they need no lock.  Each holds a
    shared flock(2), which keeps others from removing the entry.

    Threads may use the object concurrently.  The files are closed when the last call has returned.

    Attributes:
        path: The directory of the entry.
        data_fd: The descriptor of the data, valid until `close`.
        file_bytes: The length of the data file.
        units: Number of units.
    """

    def __init__(self, path: str, data_fd: int, map_fd: int, size: int) -> None:
        """Take over the open files of an entry for an object of ``size`` bytes."""
        self.path = path
        self.data_fd = data_fd
        self.file_bytes = size + _UNWRITTEN_BYTES
        self.units = units_of(size)
        self._map_fd = map_fd
        self._size = size
        self._lock = threading.Lock()
        self._users = 1
        self._closed = False

    @classmethod
    def open(cls, path: str, size: int) -> Self:
        """Open the entry in the directory ``path``, for an object of ``size`` bytes.

        Raises:
            OSError: The entry is missing, is being removed, or is not one for this size (EBADMSG).
        """
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return cls._open_in(directory, path, size)
        finally:
            os.close(directory)

    @classmethod
    def _open_in(cls, directory: int, path: str, size: int) -> Self:
        """Open the entry in an open directory; see `open`."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        data_fd = os.open(DATA_NAME, flags, dir_fd=directory)
        try:
            fcntl.flock(data_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _expect_file(data_fd, size + _UNWRITTEN_BYTES)
            map_fd = os.open(MAP_NAME, flags, dir_fd=directory)
        except BaseException:
            os.close(data_fd)
            raise
        try:
            _expect_file(map_fd, units_of(size) * _MAP_ENTRY.size)
            # No readahead: only what `load` compares gets from the disk into the page cache.
            os.posix_fadvise(data_fd, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            os.close(data_fd)
            os.close(map_fd)
            raise
        return cls(path, data_fd, map_fd, size)

    def load(self, unit: int) -> bytes | None:
        """Return the content of a unit; None if it is not there or not intact.

        What is not intact is dropped from the page cache, where other processes could read it.
        """
        if not self._enter():
            return None
        try:
            raw = os.pread(self._map_fd, _MAP_ENTRY.size, unit * _MAP_ENTRY.size)
            if len(raw) < _MAP_ENTRY.size:
                return None
            checksum, mark = _MAP_ENTRY.unpack(raw)
            if mark != _PRESENT:
                return None
            length, offset = self.length(unit), unit * UNIT_BYTES
            content = os.pread(self.data_fd, length, offset)
            if len(content) == length and _checksum(unit, content) == checksum:
                return content
            os.posix_fadvise(self.data_fd, offset, UNIT_BYTES, os.POSIX_FADV_DONTNEED)
        except OSError:
            return None
        finally:
            self._leave()
        return None

    def store(self, unit: int, content: Buffer) -> None:
        """Store the content of a unit.

        Raises:
            OSError: The host refused, the files were closed (EBADF), or the data file was cut
                (EBADMSG).
        """
        if not self._enter():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            _write(self.data_fd, content, unit * UNIT_BYTES)
            if os.lseek(self.data_fd, 0, os.SEEK_END) != self.file_bytes:
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
            entry = _MAP_ENTRY.pack(_checksum(unit, content), _PRESENT)
            _write(self._map_fd, entry, unit * _MAP_ENTRY.size)
        finally:
            self._leave()

    def count_present(self, first: int, last: int) -> int:
        """Return how many of some adjacent units the map claims to be there.

        Raises:
            OSError: The host refused.
        """
        present = 0
        step = 1 << 16
        for begin in range(first, last + 1, step):
            count = min(step, last + 1 - begin)
            raw = os.pread(self._map_fd, count * _MAP_ENTRY.size, begin * _MAP_ENTRY.size)
            words = struct.unpack(f"<{len(raw) // _MAP_ENTRY.size * 2}I", raw[: len(raw) & ~7])
            present += words[1::2].count(_PRESENT)
        return present

    def hidden_bytes(self) -> int:
        """Return the space of the data if its file was removed from the cache, otherwise 0."""
        if not self._enter():
            return 0
        try:
            status = os.fstat(self.data_fd)
        except OSError:
            return 0
        finally:
            self._leave()
        return 0 if status.st_nlink else allocated_bytes(status)

    def length(self, unit: int) -> int:
        """Return the number of bytes in a unit; only the last may be shorter than the others."""
        return min(UNIT_BYTES, self._size - unit * UNIT_BYTES)

    def close(self) -> None:
        """Close the files, when the calls that are running have returned.

        A second call does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._leave()

    def __enter__(self) -> Self:
        """Return the object; the end of the ``with`` block closes the files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        self.close()

    def _enter(self) -> bool:
        """Keep the files open until `_leave`; return False if they are closed."""
        with self._lock:
            if self._closed:
                return False
            self._users += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            is_last = not self._users
        if is_last:
            os.close(self.data_fd)
            os.close(self._map_fd)


def units_of(size: int) -> int:
    """Return the number of units of an object of ``size`` bytes."""
    return -(-size // UNIT_BYTES)


def make_files(directory: str, size: int) -> None:
    """Make the two files of an empty entry for an object of ``size`` bytes, in a new directory.

    Raises:
        OSError: The host refused.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    lengths = {DATA_NAME: size + _UNWRITTEN_BYTES, MAP_NAME: units_of(size) * _MAP_ENTRY.size}
    for name, length in lengths.items():
        fd = os.open(os.path.join(directory, name), flags, 0o600)  # noqa: PTH118  str paths
        try:
            os.ftruncate(fd, length)
        finally:
            os.close(fd)


def _expect_file(fd: int, length: int) -> None:
    """Raise OSError unless ``fd`` is a linked regular file of ``length`` bytes, of this user."""
    status = os.fstat(fd)
    if (
        not stat.S_ISREG(status.st_mode)
        or status.st_size != length
        or status.st_uid != os.geteuid()
        or not status.st_nlink
    ):
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def _checksum(unit: int, content: Buffer) -> int:
    """Return the checksum of a unit, which differs for the same content in another unit."""
    return zlib.crc32(content, unit & 0xFFFFFFFF)


def _write(fd: int, content: Buffer, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count
