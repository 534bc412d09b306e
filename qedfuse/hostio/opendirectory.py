"""An open directory, which stays the same directory when its path leads elsewhere later."""

from __future__ import annotations

import os
from typing import Final

_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_DEPTH: Final = 4096
"""Maximum number of directories above a directory that `OpenDirectory.holds` examines: more than
the names in the longest path that the kernel accepts."""


class OpenDirectory:
    """A directory that a descriptor keeps, so no rename can put another one in its place.

    Attributes:
        fd: The descriptor; -1 after `close`.
    """

    def __init__(self, path: str) -> None:
        """Open a directory, which needs no permission to list it.

        Raises:
            OSError: The directory cannot be opened.
        """
        self.fd = os.open(path, _FLAGS)

    @property
    def path(self) -> str:
        """The present path of the directory, without symbolic links.

        Raises:
            OSError: A system call failed.
        """
        return os.readlink(f"/proc/self/fd/{self.fd}")  # noqa: PTH115  no Path is wanted

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
