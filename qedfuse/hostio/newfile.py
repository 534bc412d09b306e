"""A new file that gets its final name only when it is complete.

So no program finds a partial file under this name.  Exception: if no file is replaced and the file
system has no hard links, an empty file has the name until the rename.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from qedfuse.errors import HostError, ImageInUseError, QedError, UsageError, cannot_open
from qedfuse.hostio.systemcalls import fsync_path
from qedfuse.text import printable

if TYPE_CHECKING:
    from types import TracebackType

_MAX_PREFIX_BYTES: Final = 200
"""Maximum bytes of the final name that the temporary name repeats, because of NAME_MAX."""

CONTENT_ATTRIBUTE_PREFIX: Final = "user.qedfuse."
"""The beginning of the names of extended attributes that describe the content of a file.  Such
attributes must not be copied to a file with other content."""

_LINK_UNSUPPORTED: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Errors of link(2) on a file system without hard links."""


class NewFile:
    """A temporary file in the directory of the final name, for the length of a ``with`` block.

    If the file has not got its final name by the end of the block, it is removed.

    Attributes:
        path: The temporary name; the file is empty when the block begins.
    """

    def __init__(
        self, path: str, *, mode: int = 0o644, old: int | None = None, overwrite: bool = False
    ) -> None:
        """Prepare to create ``path``; the only file that will be replaced is ``old``.

        Args:
            path: The final name.  If it is a symbolic link and ``old`` is given, the target of the
                link is replaced.
            mode: Permissions of the file if there is no ``old``; the umask is subtracted.
            old: Descriptor of the file to replace, as `lock_replaced_file` returns it; None to
                replace no file.  It must stay open until the end of the block.  The new file gets
                the permissions of the old one and, as far as the host permits, its owner, group and
                extended attributes.
            overwrite: Whether the user has agreed to replace a file.  A file with the final name
                that is not ``old`` is an error: `ImageInUseError` if True, `UsageError` if False.
        """
        follows = old is not None and os.path.islink(path)  # noqa: PTH114  a name, not a Path
        self._final = os.path.realpath(path) if follows else path
        self._name = printable(path)
        self._old = old
        self._overwrite = overwrite
        self._mode = mode
        self._exists = False  # whether the temporary file exists
        directory, name = os.path.split(self._final)
        prefix = os.fsdecode(os.fsencode(name)[:_MAX_PREFIX_BYTES])
        self.path = os.path.join(directory, f".{prefix}.{secrets.token_hex(3)}.part")  # noqa: PTH118

    def __enter__(self) -> Self:
        """Create the temporary file.

        Raises:
            UsageError: A file of the final name exists, and ``overwrite`` is False.
            ImageInUseError: A file of the final name exists, and ``overwrite`` is True.  The caller
                found no file to replace, so another process has just created this one.
            HostError: A system call failed.
        """
        if self._old is None and os.path.lexists(self._final):
            raise self._name_taken_error()
        try:
            # The replaced file may be private; `commit` copies its mode.
            mode = self._mode if self._old is None else 0o600
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        except OSError as error:
            raise _cannot_create(self._final, error) from error
        self._exists = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the temporary file if it was not committed.

        Raises nothing, because that would hide an error or a cancellation of the block.
        """
        if self._exists:
            with suppress(OSError):
                os.unlink(self.path)  # noqa: PTH108

    def commit(self, *, durable: bool = True) -> None:
        """Make the content durable, give the file its final name, and make the name durable.

        The name is not made durable if this process may not read the directory.  With
        ``durable=False`` a power failure soon after the call may lose all or part of the file.

        Raises:
            UsageError: A file other than ``old`` has the final name, and ``overwrite`` is False.
            ImageInUseError: A file other than ``old`` has the final name, and ``overwrite`` is
                True.  Another program may use that file.
            HostError: A system call failed; the file may have its final name nevertheless.
        """
        try:
            # Opened before the mode is copied: the mode may forbid the owner to open the file.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if self._old is not None:
                    _copy_attributes(self._old, fd)
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            if self._old is not None and self._is_at_name(self._old):
                os.replace(self.path, self._final)  # noqa: PTH105
            else:
                self._take_name()
            self._exists = False
            if durable:
                # A directory without read permission cannot be opened for fsync(2).  The kernel
                # will write the name to the disk later.
                with suppress(PermissionError):
                    fsync_path(os.path.dirname(self._final) or ".")  # noqa: PTH120
        except FileExistsError as error:
            raise self._name_taken_error() from error
        except OSError as error:
            if error.errno == errno.ENOENT and not os.path.lexists(self.path):
                msg = f"{self._name}: cannot make: another program has removed the temporary file"
                raise HostError(msg, errno.ENOENT) from error
            raise HostError.from_os(error, self._name, "cannot make") from error

    def _is_at_name(self, old: int) -> bool:
        """Return whether the final name is still the name of the file that is open as ``old``."""
        try:
            found = os.lstat(self._final)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(old))

    def _name_taken_error(self) -> QedError:
        """Return the error for a file of the final name that must not be replaced."""
        if self._overwrite:
            return ImageInUseError(
                f"{self._name}: not replaced: another process has meanwhile created a file of this "
                "name"
            )
        return UsageError(f"{self._name}: exists already (--force replaces it)")

    def _take_name(self) -> None:
        """Rename the temporary file to the final name, or raise FileExistsError.

        Without hard links, a file that another process renames to this name meanwhile is lost.
        """
        try:
            os.link(self.path, self._final)
        except OSError as error:
            if error.errno not in _LINK_UNSUPPORTED:
                raise
            # FAT has no hard links.  An empty file reserves the name until the rename.
            fd = os.open(self._final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            try:
                os.replace(self.path, self._final)  # noqa: PTH105
            except BaseException:
                # A rename can take effect although the file system reports an error.
                with suppress(OSError):
                    if self._is_at_name(fd):
                        os.unlink(self._final)  # noqa: PTH108
                raise
            finally:
                os.close(fd)
        else:
            with suppress(FileNotFoundError):  # harmless: the file has its final name already
                os.unlink(self.path)  # noqa: PTH108


def _copy_attributes(old: int, new: int) -> None:
    """Copy the mode of the replaced file and, as far as permitted, owner and extended attributes.

    The caller must have created the new file with mode 0600.  Extended attributes include access
    control lists.
    """
    status = os.fstat(old)
    with suppress(OSError):
        os.fchown(new, -1, status.st_gid)
    with suppress(OSError):
        os.fchown(new, status.st_uid, -1)
    # Setting an attribute "user." needs permission to write to the file.  Access control lists
    # ("system.") and the mode may take this permission away, so they come last.
    names: list[str] = []
    with suppress(OSError):
        names = sorted(os.listxattr(old), key=lambda name: name.startswith("system."))
    for name in names:
        if not name.startswith(CONTENT_ATTRIBUTE_PREFIX):
            with suppress(OSError):
                os.setxattr(new, name, os.getxattr(old, name))
    os.fchmod(new, status.st_mode & 0o7777)


def _cannot_create(path: str, error: OSError) -> HostError:
    """Return the error for a file that cannot be created; it names a missing directory."""
    directory = os.path.dirname(path)  # noqa: PTH120  a name, not a Path
    if error.errno != errno.ENOENT or not directory or os.path.lexists(directory):
        return cannot_open(path, error)
    msg = f"{printable(path)}: cannot create: found no directory {printable(directory)}"
    return HostError(msg, errno.ENOENT)
