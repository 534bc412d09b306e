"""A file that gets its name when it is complete, and leaves nothing behind if it never is."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Self

from qedfuse.errors import HostError, UsageError, cannot_open
from qedfuse.util.text import printable

if TYPE_CHECKING:
    from types import TracebackType


class NewFile:
    """A temporary name beside the final one, for the length of a ``with`` block.

    Attributes:
        path: The temporary name; an empty file is there when the block begins.
    """

    def __init__(self, path: str, *, overwrite: bool = False) -> None:
        """Prepare to make ``path``; an existing file is replaced only with ``overwrite``."""
        directory, name = os.path.split(path)
        self._final = path
        self._overwrite = overwrite
        self._there = False
        self.path = os.path.join(directory, f".{name}.{secrets.token_hex(3)}.part")  # noqa: PTH118

    def __enter__(self) -> Self:
        """Make the temporary file.

        Raises:
            UsageError: There is a file of the final name, and it is not to be replaced.
            HostError: The host refused.
        """
        if os.path.lexists(self._final) and not self._overwrite:
            msg = f"{printable(self._final)}: exists already (--force replaces it)"
            raise UsageError(msg)
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
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
            UsageError: There is a file of that name now.
            HostError: The host refused.
        """
        try:
            if durable:
                self._sync(self.path)
            if self._overwrite:
                if os.path.exists(self._final):  # noqa: PTH110
                    os.chmod(self.path, os.stat(self._final).st_mode & 0o7777)  # noqa: PTH101, PTH116
                os.replace(self.path, self._final)  # noqa: PTH105
            else:
                os.link(self.path, self._final)
                os.unlink(self.path)  # noqa: PTH108
            self._there = False
            if durable:
                self._sync(os.path.dirname(self._final) or ".")  # noqa: PTH120
        except FileExistsError as error:
            msg = f"{printable(self._final)}: exists already (--force replaces it)"
            raise UsageError(msg) from error
        except OSError as error:
            raise HostError.from_os(error, printable(self._final), "cannot make") from error

    @staticmethod
    def _sync(path: str) -> None:
        """Make a file or a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
