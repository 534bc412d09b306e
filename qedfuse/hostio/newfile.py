"""A file that gets its name when it is complete, and leaves nothing behind if it never is."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from qedfuse.errors import HostError, ImageInUseError, QedError, UsageError, cannot_open
from qedfuse.text import printable

if TYPE_CHECKING:
    from types import TracebackType

_LONGEST: Final = 200
"""Bytes of the final name that are in the temporary one; a name has at most 255."""

_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class NewFile:
    """A temporary name beside the final one, for the length of a ``with`` block.

    Attributes:
        path: The temporary name; an empty file is there when the block begins.
    """

    def __init__(
        self, path: str, *, mode: int = 0o644, old: int | None = None, overwrite: bool = False
    ) -> None:
        """Prepare to make ``path``; no other file than ``old`` is replaced.

        Args:
            path: The final name.  If it is a symbolic link to ``old``, what it leads to is
                replaced, as programs do that write into it.
            mode: Permissions of a file where there was none, less the umask.
            old: Descriptor of the file to replace, as `lock_replaced_file` returns it; it must
                stay open.  Its owner, permissions and attributes are copied.
            overwrite: Whether the user has agreed to replace a file.  Chooses between two
                messages, and nothing else.
        """
        follows = old is not None and os.path.islink(path)  # noqa: PTH114  a name, not a Path
        self._final = os.path.realpath(path) if follows else path
        self._name = printable(path)
        self._old = old
        self._overwrite = overwrite
        self._mode = mode
        self._there = False
        directory, name = os.path.split(self._final)
        start = os.fsdecode(os.fsencode(name)[:_LONGEST])
        self.path = os.path.join(directory, f".{start}.{secrets.token_hex(3)}.part")  # noqa: PTH118

    def __enter__(self) -> Self:
        """Make the temporary file.

        Raises:
            UsageError: There is a file of the final name, and it is not to be replaced.
            ImageInUseError: As `commit`.
            HostError: The host refused.
        """
        if self._old is None and os.path.lexists(self._final):
            raise self._taken()
        try:
            # The replaced file may be private.
            mode = self._mode if self._old is None else 0o600
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        except OSError as error:
            raise cannot_open(self._final, error) from error
        self._there = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the file, unless it was committed."""
        if self._there:
            os.unlink(self.path)  # noqa: PTH108

    def commit(self, *, durable: bool = True) -> None:
        """Give the file its name, once everything in it is on the host's disk.

        Without ``durable`` the host may lose it, or some of it, when its power fails soon.

        Raises:
            UsageError: A file of that name has appeared.
            ImageInUseError: The same, where the user has agreed to replace a file: another
                one than the caller has locked, so it may be in use.
            HostError: The host refused.
        """
        try:
            if self._old is not None:
                _copy_attributes(self._old, self.path)
            if durable:
                self._sync(self.path)
            if self._old is not None and self._is_at_name(self._old):
                os.replace(self.path, self._final)  # noqa: PTH105
            else:
                self._take_name()
            self._there = False
            if durable:
                # A directory that may not be read cannot be told to be durable.  The file
                # is complete all the same, and its name on its way to the disk.
                with suppress(PermissionError):
                    self._sync(os.path.dirname(self._final) or ".")  # noqa: PTH120
        except FileExistsError as error:
            raise self._taken() from error
        except OSError as error:
            raise HostError.from_os(error, self._name, "cannot make") from error

    def _is_at_name(self, old: int) -> bool:
        """Tell whether the final name still leads to the file that is open as ``old``."""
        try:
            found = os.lstat(self._final)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(old))

    def _taken(self) -> QedError:
        """Make the error for a file of the final name that must not be replaced."""
        if self._overwrite:
            return ImageInUseError(
                f"{self._name}: found a file that another process has put there meanwhile, "
                "expected the file, or none, that was there at the start: not replaced"
            )
        return UsageError(f"{self._name}: exists already (--force replaces it)")

    def _take_name(self) -> None:
        """Take the final name unless somebody else has it.

        Raises:
            OSError: It is taken, or the host refused.
        """
        try:
            os.link(self.path, self._final)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # FAT has one name for each file.  An empty file holds the place meanwhile.
            os.close(os.open(self._final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            os.replace(self.path, self._final)  # noqa: PTH105
        else:
            os.unlink(self.path)  # noqa: PTH108

    @staticmethod
    def _sync(path: str) -> None:
        """Make a file or a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _copy_attributes(old: int, new: str) -> None:
    """Give a new file the owner, the mode and the attributes of the one that it replaces.

    Access control lists are such attributes.  Only root may give a file away; what cannot
    be had is left as it is.
    """
    there = os.fstat(old)
    with suppress(OSError):
        os.chown(new, -1, there.st_gid)
    with suppress(OSError):
        os.chown(new, there.st_uid, -1)
    os.chmod(new, there.st_mode & 0o7777)  # noqa: PTH101
    with suppress(OSError):
        for name in os.listxattr(old):
            with suppress(OSError):
                os.setxattr(new, name, os.getxattr(old, name))
