"""The methods of `HostFile` that change a file, for files that cannot be changed."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NoReturn

from qedfuse.errors import HostError

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.hostio.pagesource import PageSource


class ReadOnlyFile:
    """A base class of files that cannot be changed: every change is refused with EROFS.

    Attributes:
        name: The file's name in messages.
        writable: Always False.
        can_punch: Always False.
    """

    writable = False
    can_punch = False

    def __init__(self, name: str) -> None:
        """Refuse all changes of a file, whose name in messages is ``name``."""
        self.name = name

    @property
    def page_source(self) -> PageSource | None:
        """None: unless a subclass returns another value, the mount's extension must not read."""
        return None

    def can_write_inline(self, _length: int) -> bool:
        """Return False."""
        return False

    def try_write(self, _offset: int, _data: Buffer) -> bool:
        """Return False."""
        return False

    def try_grow(self, _size: int) -> bool:
        """Return False."""
        return False

    async def pwrite(self, _offset: int, *_parts: Buffer) -> None:
        """Raise HostError."""
        self._refuse("write")

    async def truncate(self, _size: int) -> None:
        """Raise HostError."""
        self._refuse("truncate")

    async def punch(self, *_ranges: tuple[int, int]) -> None:
        """Raise HostError."""
        self._refuse("punch")

    async def reserve(self, _offset: int, _length: int) -> None:
        """Raise HostError."""
        self._refuse("reserve")

    async def set_times(self, _atime_ns: int, _mtime_ns: int) -> None:
        """Raise OSError."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def try_datasync(self) -> bool:
        """Return True: nothing was written."""
        return True

    async def datasync(self) -> None:
        """Return: nothing was written."""

    def _refuse(self, action: str) -> NoReturn:
        msg = f"{self.name}: {action}: {os.strerror(errno.EROFS)}"
        raise HostError(msg, errno.EROFS)
