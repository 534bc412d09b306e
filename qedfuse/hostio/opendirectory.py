"""An open directory, which stays the same directory when its path leads elsewhere later."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, closing, suppress
from typing import Final

_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_DEPTH: Final = 4096
"""Maximum number of directories above a directory that `OpenDirectory.holds` examines: more than
the names in the longest path that the kernel accepts."""
_MAX_LINKS: Final = 40
"""Maximum number of symbolic links that the kernel follows in one path."""


class OpenDirectory:
    """A directory that a descriptor keeps, so no rename can put another one in its place.

    Attributes:
        fd: The descriptor; -1 after `close`.
    """

    def __init__(self, path: str, *, dir_fd: int | None = None) -> None:
        """Open a directory, which needs no permission to list it.

        Args:
            path: The path of the directory.
            dir_fd: The directory where a relative path begins; None for the working directory.

        Raises:
            OSError: The directory cannot be opened.
        """
        self.fd = os.open(path, _FLAGS, dir_fd=dir_fd)

    @property
    def path(self) -> str:
        """The present path of the directory, without symbolic links.

        Raises:
            OSError: A system call failed.
        """
        return kernel_path(self.fd)

    def has_entry(self, name: str, status: os.stat_result) -> bool:
        """Return whether ``name`` in the directory is the file with the attributes ``status``.

        A symbolic link is not followed, so it is another file than the one to which it leads.

        Raises:
            OSError: A system call failed, except if there is no such name.
        """
        try:
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, status)

    def holds(self, other: OpenDirectory) -> bool:
        """Return whether ``other`` is this directory, or lies below it at any depth.

        This method goes up from ``other`` by descriptors, and compares directories, not paths.  So
        the result does not change if a directory is exchanged with a link during the call.

        Returns False also if a directory on the way may not be searched.

        Raises:
            OSError: Another system call failed.
        """
        wanted, root = os.fstat(self.fd), os.stat("/")  # noqa: PTH116  no Path is wanted
        fd = os.dup(other.fd)
        try:
            for _ in range(_MAX_DEPTH):
                status = os.fstat(fd)
                if os.path.samestat(status, wanted):
                    return True
                if os.path.samestat(status, root):
                    return False
                parent = os.open("..", _FLAGS, dir_fd=fd)
                os.close(fd)
                fd = parent
        except PermissionError:
            return False
        finally:
            os.close(fd)
        return False

    def close(self) -> None:
        """Close the directory; a second call does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


def kernel_path(fd: int) -> str:
    """Return the kernel's path of an open file or directory, without symbolic links.

    Raises:
        OSError: A system call failed.
    """
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115  no Path is wanted


def real_directory(fd: int, name: str, directory: OpenDirectory) -> OpenDirectory:
    """Return the directory that has an open file itself as an entry, not as a symbolic link.

    The result is ``directory``, or else a new object, which the caller must close.

    Args:
        fd: The file.
        name: The name by which the file was opened, which may be a symbolic link.
        directory: The directory in which the name was looked up.

    Raises:
        OSError: The file has been moved or removed, or a system call failed.
    """
    status = os.fstat(fd)
    if directory.has_entry(name, status):
        return directory
    with suppress(OSError), ExitStack() as stack:
        parent, last = os.path.split(kernel_path(fd))
        found = stack.enter_context(closing(OpenDirectory(parent)))
        if found.has_entry(last, status):
            stack.pop_all()
            return found
    # The user may lack the permission to search a directory in the kernel's path.
    return _follow_links(name, directory, status)


def _follow_links(name: str, directory: OpenDirectory, status: os.stat_result) -> OpenDirectory:
    """Return the directory of the file to which a symbolic link leads, as a new object.

    Args:
        name: The name of the link.
        directory: The directory of the link.
        status: The attributes of the file that must be found.

    Raises:
        FileNotFoundError: The links lead to another file, or to none.
        OSError: A system call failed.
    """
    with ExitStack() as stack:
        for _ in range(_MAX_LINKS):
            parent, name = os.path.split(_link_target(name, directory))
            following = OpenDirectory(parent or ".", dir_fd=directory.fd)
            stack.close()
            stack.callback(following.close)
            directory = following
            if directory.has_entry(name, status):
                stack.pop_all()
                return directory
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _link_target(name: str, directory: OpenDirectory) -> str:
    """Return the path in a symbolic link.

    Raises:
        FileNotFoundError: There is no such name, or it is not a symbolic link.
        OSError: A system call failed.
    """
    try:
        return os.readlink(name, dir_fd=directory.fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
