"""The base class of files that cannot be changed and have no descriptor of their own."""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from qedfuse.errors import HostError
from qedfuse.hostio.regular import STAT_BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.hostio.pagesource import PageSource, WriteTarget
    from qedfuse.hostio.readpolicy import ReadPolicy
    from qedfuse.hostio.serversilence import ServerSilence


class ServerReads(NamedTuple):
    """Counters of what was fetched from a file's server.

    Attributes:
        requests: Number of requests that the server has answered with data.
        awaited_requests: Number of these requests that a reader has waited for.
        bytes: Number of bytes of the file that the server has sent.
    """

    requests: int
    awaited_requests: int
    bytes: int


class ReadOnlyFile(ABC):
    """A base class of files that cannot be changed: every change is refused with EROFS.

    Attributes:
        name: The file's name in messages.
        writable: Always False.
        can_punch: Always False.
    """

    writable = False
    can_punch = False

    def __init__(self, name: str) -> None:
        """Make the file; ``name`` is its name in messages."""
        self.name = name

    @property
    def page_source(self) -> PageSource | None:
        """None, so the mount's extension does not read the file; a subclass may override this."""
        return None

    @property
    def write_target(self) -> WriteTarget | None:
        """None: the file cannot be written."""
        return None

    @property
    def server_reads(self) -> ServerReads | None:
        """Counters of the fetches from a server; None if no server has the file."""
        return None

    @property
    def silence(self) -> ServerSilence | None:
        """Limits how long fills wait for the file's server while it does not answer.

        None if no server has the file.
        """
        return None

    @property
    def read_policy(self) -> ReadPolicy | None:
        """None: there is no policy, so the callers always call `try_read`."""
        return None

    def fileno(self) -> int:
        """Return -1: no descriptor gives access to the bytes of the file."""
        return -1

    @abstractmethod
    def size(self) -> int:
        """Return the file's length in bytes."""

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes at a file offset; fewer only where the file ends."""
        buffer = bytearray(max(0, min(length, self.size() - offset)))
        await self.pread_into(offset, memoryview(buffer))
        return buffer

    @abstractmethod
    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; see `ReadableFile.pread_into`."""

    def try_start_read(
        self,
        _offset: int,
        _view: memoryview,
        _take_answer: Callable[[], object],
        _ended: Callable[[int], object],
    ) -> bool:
        """Return False: native threads cannot read the file, because it has no descriptor."""
        return False

    def stored_blocks(self) -> int:
        """Return the number of blocks of 512 bytes that a file of this size without holes has."""
        return -(-self.size() // STAT_BLOCK_BYTES)

    def _status(self, modified: float) -> os.stat_result:
        """Return attributes like those of a read-only local file of this user.

        All times of the file are ``modified``, in seconds since 1970.
        """
        values = (
            *(stat.S_IFREG | 0o444, 0, 0, 1, os.geteuid(), os.getegid(), self.size()),
            *(int(modified), int(modified), int(modified)),
        )
        seconds = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), modified)
        nanoseconds = {f"{name}_ns": int(value * 1e9) for name, value in seconds.items()}
        return os.stat_result(
            values,
            {**seconds, **nanoseconds, "st_blocks": self.stored_blocks(), "st_blksize": 4096},
        )

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

    async def datasync(self) -> None:  # noqa: B027  no subclass has more to do
        """Return: nothing was written."""

    def _refuse(self, action: str) -> NoReturn:
        msg = f"{self.name}: {action}: {os.strerror(errno.EROFS)}"
        raise HostError(msg, errno.EROFS)
