"""The data file in which the cache keeps the fetched parts of one version of a remote file.

The remote file, the *object*, is divided into *units* of 256 KiB.  Each unit has a checksum in a
second file, the map (`qedfuse.remote.checksummap`).  The two files are an *entry* of the cache.

A process uses a unit only if it has fetched the unit itself, or has compared the bytes in the page
cache with the checksum.  So the cache needs no order of writes, no datasync and no journal: a unit
that a crash, a full disk or another program has damaged differs from its checksum, and is fetched
again.

If several processes have an entry open, a unit is first read with ``O_DIRECT``, around the page
cache, and compared.  Otherwise damaged bytes of the disk could come into the page cache, where a
process that has compared the unit earlier would read them.  docs/remote.md lists the cases in which
this can happen nevertheless.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from qedfuse.hostio.regular import allocated_bytes
from qedfuse.hostio.residency import Residency
from qedfuse.hostio.systemcalls import write_all
from qedfuse.remote.checksummap import ChecksumMap, map_bytes
from qedfuse.remote.sharing import ALONE_BYTES, SHARED_BYTES, has_length, join
from qedfuse.util.deferredclose import DeferredClose
from qedfuse.util.descriptors import close_descriptors
from qedfuse.util.extensions import try_import_extension

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from qedfuse.hostio.hostfile import Buffer

_INTERFACE: Final = 1
"""The interface number of the extension ``_crc32``."""

# None if the extension is not installed, or if the processor lacks the instructions that it uses.
_extension = try_import_extension("qedfuse.remote._crc32", _INTERFACE)
_crc32: Final[Callable[[Buffer, int], int]] = zlib.crc32 if _extension is None else _extension.crc32

UNIT_BYTES: Final = 1 << 18
"""Bytes in a unit.  Over a connection with 20 ms latency and 80 MiB/s, a request of 4 KiB takes
20 ms, and a request of 256 KiB takes 23 ms."""

DATA_NAME: Final = "data"
MAP_NAME: Final = "map"


class RemovedUsage(NamedTuple):
    """What an open data file takes up that was removed from the cache.

    Attributes:
        allocated_bytes: The disk space of the file in bytes.
        filesystem: The state of its file system.
    """

    allocated_bytes: int
    filesystem: os.statvfs_result


class UnitFile:
    """The data and the map of one entry of the cache, which several processes may have open.

    Two processes that fetch the same unit write the same bytes, so writes need no lock.  Each
    process holds a shared flock(2) on the data file, so that no other process removes the entry.
    Threads may call the methods concurrently.

    Attributes:
        path: The directory of the entry.
        data_fd: The descriptor of the data, valid until `close`.
        size: The size of the object in bytes.
        units: Number of units of the object.
    """

    def __init__(self, path: str, data_fd: int, map_fd: int, size: int) -> None:
        """Take over the open files of an entry for an object of ``size`` bytes.

        Raises:
            OSError: A system call failed.
        """
        self.path = path
        self.data_fd = data_fd
        self.size = size
        self.units = units_of(size)
        self._map = ChecksumMap(map_fd)
        self._residency = Residency(data_fd, size + SHARED_BYTES)
        self._direct_fd = _open_direct(data_fd)
        self._use = DeferredClose(self._close_files)

    @classmethod
    def open(cls, path: str, size: int) -> Self:
        """Open the entry in the directory ``path``, for an object of ``size`` bytes.

        Raises:
            OSError: A system call failed.  EWOULDBLOCK: another process is removing or opening the
                entry.  EBADMSG: the entry is damaged, or is for an object of another size.
        """
        directory = open_directory(path)
        try:
            return cls.open_in(directory, path, size)
        finally:
            os.close(directory)

    @classmethod
    def open_in(cls, directory: int, path: str, size: int) -> Self:
        """Open the entry in the open directory ``directory``, which was ``path``; see `open`."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        data_fd = os.open(DATA_NAME, flags, dir_fd=directory)
        try:
            fcntl.flock(data_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _require_file(data_fd)
            map_fd = os.open(MAP_NAME, flags, dir_fd=directory)
        except BaseException:
            close_descriptors((data_fd,))
            raise
        try:
            _require_file(map_fd, map_bytes(units_of(size)))
            join(data_fd, map_fd, size)
            # No readahead: it would bring bytes into the page cache that `load` has not compared.
            os.posix_fadvise(data_fd, 0, 0, os.POSIX_FADV_RANDOM)
            return cls(path, data_fd, map_fd, size)
        except BaseException:
            close_descriptors((data_fd, map_fd))
            raise

    def load(self, unit: int) -> bytes | None:
        """Return the content of a unit; None if the unit is missing, damaged or cannot be read.

        A damaged unit is dropped from the page cache, because other processes could read it there.
        """
        if not self._use.enter():
            return None
        try:
            checksum = self._map.checksum(unit)
            if checksum is None or not self._may_cache(unit, checksum):
                return None
            length, offset = self.length(unit), unit * UNIT_BYTES
            content = os.pread(self.data_fd, length, offset)
            if len(content) == length and _checksum(unit, content) == checksum:
                return content
            os.posix_fadvise(self.data_fd, offset, UNIT_BYTES, os.POSIX_FADV_DONTNEED)
        except OSError:
            return None
        finally:
            self._use.leave()
        return None

    def store(self, first: int, content: Buffer) -> None:
        """Store the content of adjacent units, beginning with the unit ``first``.

        Raises:
            OSError: A system call failed, the files were closed (EBADF), or the data file was
                truncated (EBADMSG).
        """
        if not self._use.enter():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            write_all(self.data_fd, first * UNIT_BYTES, (content,))
            if not has_length(os.lseek(self.data_fd, 0, os.SEEK_END), self.size):
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
            checksums = [_checksum(unit, block) for unit, block in blocks_of(first, content)]
            self._map.write_checksums(first, checksums)
        finally:
            self._use.leave()

    def has_units(self, needed: bytes | None = None, first: int = 0) -> bool:
        """Return whether the map has a checksum for each needed unit of a range.

        Args:
            needed: A byte for each unit of the range: 1 if the unit is needed, 0 if it is not; None
                if all units from ``first`` on are needed.
            first: The first unit of the range.

        Raises:
            OSError: A system call failed, or the files are closed (EBADF).
        """
        if not self._use.enter():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            count = self.units - first if needed is None else len(needed)
            return self._map.has_units(first, count, needed)
        finally:
            self._use.leave()

    def has_any(self, first: int, last: int) -> bool:
        """Return whether the map has a checksum for one of the units ``first`` to ``last``.

        Raises:
            OSError: A system call failed, or the files are closed (EBADF).
        """
        if not self._use.enter():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            return self._map.has_any(first, last)
        finally:
            self._use.leave()

    def is_in(self, directory: int) -> bool:
        """Return whether the data file in an open directory is this entry's; False after `close`.

        Raises:
            OSError: A system call failed, or the directory has no data file.
        """
        if not self._use.enter():
            return False
        try:
            found = os.stat(DATA_NAME, dir_fd=directory, follow_symlinks=False)
            return os.path.samestat(found, os.fstat(self.data_fd))
        finally:
            self._use.leave()

    def removed_usage(self) -> RemovedUsage | None:
        """Return what the data file takes up if it was removed from the cache; otherwise None.

        Also returns None after `close`, or if the host refuses.
        """
        if not self._use.enter():
            return None
        try:
            status = os.fstat(self.data_fd)
            if status.st_nlink:
                return None
            return RemovedUsage(allocated_bytes(status), os.fstatvfs(self.data_fd))
        except OSError:
            return None
        finally:
            self._use.leave()

    def length(self, unit: int) -> int:
        """Return the number of bytes in a unit; only the last may be shorter than the others."""
        return min(UNIT_BYTES, self.size - unit * UNIT_BYTES)

    def close(self) -> None:
        """Close the files when the running calls have returned, without waiting for them."""
        self._use.close()

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

    def _close_files(self) -> None:
        """Close the files; errors are ignored.

        On NFS close(2) writes the data back, and fails if the server is full.  What the cache loses
        then is found by its checksum.
        """
        self._residency.close()
        close_descriptors((self.data_fd, self._map.fd))
        if self._direct_fd >= 0:
            close_descriptors((self._direct_fd,))

    def _may_cache(self, unit: int, checksum: int) -> bool:
        """Return False if a unit is damaged, so that it must not enter the page cache.

        Returns True without a comparison if none is needed or possible.
        """
        length, offset = self.length(unit), unit * UNIT_BYTES
        is_shared = os.lseek(self.data_fd, 0, os.SEEK_END) != self.size + ALONE_BYTES
        if not is_shared or self._direct_fd < 0 or self._residency.has_range(offset, length):
            return True
        with mmap.mmap(-1, UNIT_BYTES) as buffer:  # O_DIRECT needs an aligned buffer
            try:
                done = os.preadv(self._direct_fd, [buffer], offset)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the disk needs a larger alignment of the buffer
                    return True
                raise
            with memoryview(buffer) as view, view[:length] as content:
                return done >= length and _checksum(unit, content) == checksum


def units_of(size: int) -> int:
    """Return the number of units of an object of ``size`` bytes."""
    return -(-size // UNIT_BYTES)


def blocks_of(first: int, content: Buffer) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and the content of each unit; the first unit has the number ``first``."""
    view = memoryview(content)
    for begin in range(0, len(view), UNIT_BYTES):
        yield first + begin // UNIT_BYTES, view[begin : begin + UNIT_BYTES]


def make_files(directory: str, size: int) -> None:
    """Make the two files of an empty entry in a new directory, for an object of ``size`` bytes.

    Raises:
        OSError: A system call failed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    lengths = {DATA_NAME: size + ALONE_BYTES, MAP_NAME: map_bytes(units_of(size))}
    for name, length in lengths.items():
        fd = os.open(os.path.join(directory, name), flags, 0o600)  # noqa: PTH118  str paths
        try:
            os.ftruncate(fd, length)
        finally:
            os.close(fd)


def open_directory(path: str) -> int:
    """Open the directory of an entry, without following a symbolic link; return the descriptor.

    Raises:
        OSError: A system call failed, or ``path`` is not a directory.
    """
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _open_direct(fd: int) -> int:
    """Open a file again for reads around the page cache; return -1 if the host refuses."""
    flags = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    except OSError:
        return -1


def _require_file(fd: int, length: int | None = None) -> None:
    """Raise OSError (EBADMSG) unless ``fd`` is a regular file of this user that was not removed.

    If ``length`` is not None, the file must also have this length.
    """
    status = os.fstat(fd)
    if (
        not stat.S_ISREG(status.st_mode)
        or length not in {None, status.st_size}
        or status.st_uid != os.geteuid()
        or not status.st_nlink
    ):
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def _checksum(unit: int, content: Buffer) -> int:
    """Return the checksum of a unit, computed from its content and its number."""
    return _crc32(content, unit & 0xFFFFFFFF)
