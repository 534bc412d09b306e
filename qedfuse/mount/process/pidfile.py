"""The pid file of a mount.

The directory of the pid file is opened before the mount exists, and the pid file is written and
removed through the open directory.  If the serving process resolved the path later, and the path
led through the mount, the process would wait forever for its own reply.

A file is *special* if it is not a regular file (for example a pipe), or if it has no name any more.
The file itself is opened then, and not its directory.  It is written in place, and never removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError
from qedfuse.text import printable
from qedfuse.util.descriptors import open_descriptors
from qedfuse.util.landlock import READ_FILE, REMOVE_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator

_CANNOT_WRITE: Final = "cannot write the pid file"
_NOT_REPLACEABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
"""If replacing the file fails with one of these errors, the file is overwritten instead."""
_MAX_PID_FILE_BYTES: Final = 32
"""Maximum number of bytes that are read from a pid file; no pid has more digits."""


class PidFile:
    """The file that contains the pid of the process that serves the mount.

    Attributes:
        path: The path of the file, absolute and free of symbolic links.
    """

    def __init__(self, path: str) -> None:
        """Open the directory of the file, or the file itself if it is special.

        The file need not exist, but its directory must.

        Raises:
            HostError: The directory or the file cannot be opened, the file is a directory, or the
                file exists and /proc is not mounted.
        """
        self.path = os.path.realpath(path)
        self._is_written = False
        self._printable_path = printable(path)
        directory, self._name = os.path.split(self.path)
        flags = os.O_PATH | os.O_CLOEXEC
        try:
            found = _status(path)
            if found is not None and stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._is_special = found is not None and not (
                stat.S_ISREG(found.st_mode) and found.st_nlink
            )
            # The program that started this process, and left it a descriptor of the file, may hold
            # a lock on the file.  A new file would not be locked, so `write` overwrites the file.
            self._was_open = found is not None and any(
                os.path.samestat(found, os.fstat(number)) for number in open_descriptors()
            )
            # The path of a special file may be a link in /proc, such as /dev/fd/N, whose target
            # need not be in any directory.
            self._handle = os.open(
                path if self._is_special else directory,
                flags if self._is_special else flags | os.O_DIRECTORY,
            )
        except OSError as error:
            raise HostError.from_os(error, self._printable_path, _CANNOT_WRITE) from error

    def write(self) -> None:
        """Write the pid of this process as one line, without waiting for a reader.

        A file is written in place if it is special, if this process had it open before the
        constructor ran, or if it cannot be replaced.  Any other file is created or replaced
        atomically.

        Raises:
            HostError: The file cannot be written now, for example because a FIFO has no reader
                or a pipe is full.
        """
        try:
            if self._is_special:
                self._write_to(f"/proc/self/fd/{self._handle}", None)
            else:
                self._replace()
        except OSError as error:
            if error.errno == errno.ENXIO and stat.S_ISFIFO(os.fstat(self._handle).st_mode):
                msg = f"{self._printable_path}: {_CANNOT_WRITE}: found a FIFO without a reader"
                raise HostError(msg, errno.ENXIO) from error
            raise HostError.from_os(error, self._printable_path, _CANNOT_WRITE) from error
        self._is_written = True

    def _replace(self) -> None:
        """Replace the file atomically; overwrite it if it was open or cannot be replaced."""
        directory = self._handle
        if self._was_open:
            self._write_to(self._name, directory)
            return
        new = f".qedfuse.{os.urandom(8).hex()}"
        try:
            self._write_to(new, directory, os.O_CREAT | os.O_EXCL)
            os.rename(new, self._name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new, dir_fd=directory)
            if error.errno not in _NOT_REPLACEABLE:
                raise
            # For example, the user may write to the file but not to the directory, or the file is a
            # mountpoint.
            try:
                self._write_to(self._name, directory)
            except FileNotFoundError:
                # There is no file to overwrite, so the error of the replacement is raised.
                raise error from None

    @staticmethod
    def _write_to(name: str, directory: int | None, flags: int = 0) -> None:
        """Overwrite or create a file with one line, the pid; a regular file ends after this line.

        Raises OSError with EAGAIN if the file does not take the whole line now.
        """
        flags |= os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
        if directory is not None:
            flags |= os.O_NOFOLLOW
        fd = os.open(name, flags, 0o666, dir_fd=directory)
        with open(fd, "wb", buffering=0) as file:  # noqa: PTH123  a descriptor
            line = b"%d\n" % os.getpid()
            if file.write(line) != len(line):
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if stat.S_ISREG(os.fstat(fd).st_mode):
                file.truncate(len(line))

    def needed_files(self) -> Iterator[tuple[int, int]]:
        """Yield the descriptors that `remove` needs, each with its Landlock rights.

        The first one is closed when the caller requests the second.
        """
        if self._is_special:
            return
        with contextlib.suppress(OSError):
            fd = os.open(self._name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._handle)
            try:
                yield fd, READ_FILE
            finally:
                os.close(fd)
        yield self._handle, REMOVE_FILE

    def remove(self) -> None:
        """Remove the file if `write` has written it and it still contains this process's pid.

        A special file is not removed.  A failure is ignored.
        """
        if self._is_special or not self._is_written:
            return
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(self._name, flags, dir_fd=self._handle)
            with open(fd, "rb") as file:  # noqa: PTH123  a descriptor
                if (
                    stat.S_ISREG(os.fstat(fd).st_mode)
                    and int(file.read(_MAX_PID_FILE_BYTES)) == os.getpid()
                ):
                    os.unlink(self._name, dir_fd=self._handle)

    def close(self) -> None:
        """Close the descriptor; the object cannot be used any more.  A second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _status(path: str) -> os.stat_result | None:
    """Return the result of stat(2); None if the file, or the target of a link, is missing."""
    try:
        return os.stat(path)  # noqa: PTH116  a name, not a Path
    except FileNotFoundError:
        return None
