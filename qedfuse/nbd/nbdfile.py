"""An export of an NBD server as a file of a chain: a `HostFile` that cannot be changed."""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import ObjectChangedError, RemoteError
from qedfuse.hostio.readonlyfile import ReadOnlyFile
from qedfuse.nbd.failures import BrokenError, ProtocolError, RefusedError, ReplyError
from qedfuse.nbd.requests import Read
from qedfuse.remote.outagelog import OutageLog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qedfuse.hostio.hostfile import FileIdentity
    from qedfuse.hostio.readpolicy import ReadPolicy
    from qedfuse.nbd.handshake import Export
    from qedfuse.nbd.links import Links
    from qedfuse.nbd.requests import Request
    from qedfuse.remote.options import Deadlines

_BLOCK_BYTES = 512
"""The unit of ``st_blocks``."""
_MAX_REQUEST_BYTES: Final = 1 << 20
_FIRST_PAUSE_SECONDS: Final = 0.1
_MAX_PAUSE_SECONDS: Final = 5.0
_MAX_PROTOCOL_ERRORS: Final = 2
"""After this number of them in one read the read fails, because the server has a bug."""


class NbdFile(ReadOnlyFile):
    """An export that is open for reading.

    Attributes:
        path: The URL, or another name of the export.
    """

    def __init__(
        self, path: str, name: str, export: Export, links: Links, deadlines: Deadlines
    ) -> None:
        """Read an export; `qedfuse.nbd.opening.open_nbd` makes the arguments.

        Args:
            path: The URL.
            name: The name in messages.
            export: The export.
            links: The connections, which the file closes.
            deadlines: How long to wait for the server.
        """
        super().__init__(name)
        self.path = path
        self._size = export.size
        self._links = links
        self._deadlines = deadlines
        self._outages = OutageLog(name, "reads fail until it answers again")
        self._opened = time.time()
        self._closed = threading.Event()

    @property
    def read_policy(self) -> ReadPolicy | None:
        """None: there is nothing that `try_read` could find."""
        return None

    @property
    def identity(self) -> FileIdentity:
        """The URL and the size; an export has nothing else that distinguishes its versions."""
        return (self.path, self._size, "")

    def fileno(self) -> int:
        """Return -1: no file of the operating system has the bytes."""
        return -1

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes at a file offset; fewer only where the file ends."""
        buffer = bytearray(max(0, min(length, self._size - offset)))
        await self.pread_into(offset, memoryview(buffer))
        return buffer

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only if the file ends earlier.

        Raises:
            RemoteError: The server does not give the bytes.
        """
        length = max(0, min(len(view), self._size - offset))
        if not length:
            await trio.lowlevel.checkpoint()
            return 0
        attempts = _Attempts(self.name, self._deadlines, self._outages)
        while True:
            try:
                connection = await self._links.connection()
                parts = _Parts(connection.export, offset, view[:length])
                await connection.run(parts.requests, attempts.end)
                parts.finish()
            except (BrokenError, RefusedError, ReplyError) as error:
                seconds = attempts.failed(error, is_closed=self._links.is_closed)
                await trio.sleep(seconds)
            else:
                self._outages.answered()
                return length

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; see `ReadableFile.read_blocking`.

        Raises:
            RemoteError: The server does not give the bytes.
        """
        length = max(0, min(len(view), self._size - offset))
        if not length:
            return 0
        attempts = _Attempts(self.name, self._deadlines, self._outages)
        while True:
            try:
                connection = self._links.connection_blocking()
                parts = _Parts(connection.export, offset, view[:length])
                connection.run_blocking(parts.requests, attempts.end)
                parts.finish()
            except (BrokenError, RefusedError, ReplyError) as error:
                seconds = attempts.failed(error, is_closed=self._links.is_closed)
                self._closed.wait(seconds)
            else:
                self._outages.answered()
                return length

    def try_read(self, _offset: int, _view: memoryview) -> bool:
        """Return False, because every read asks the server."""
        return False

    def try_start_read(
        self,
        _offset: int,
        _view: memoryview,
        _take_answer: Callable[[], object],
        _ended: Callable[[int], object],
    ) -> bool:
        """Return False: no thread reads."""
        return False

    async def next_data(self, offset: int) -> int | None:
        """Return where the first data at or past ``offset`` begins; None if no data follows."""
        await trio.lowlevel.checkpoint()
        return offset if offset < self._size else None

    async def next_hole(self, offset: int) -> int | None:
        """Return where the first hole at or past ``offset`` begins; None past the end."""
        await trio.lowlevel.checkpoint()
        return self._size if offset < self._size else None

    def size(self) -> int:
        """Return the file's length in bytes."""
        return self._size

    def stored_blocks(self) -> int:
        """Return the number of blocks of 512 bytes of the export."""
        return -(-self._size // _BLOCK_BYTES)

    def stat(self) -> os.stat_result:
        """Return attributes as for a local file of this user without permission to write."""
        opened = int(self._opened)
        values = (
            *(stat.S_IFREG | 0o444, 0, 0, 1, os.geteuid(), os.getegid(), self._size),
            *(opened, opened, opened),
        )
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._opened)
        nanoseconds = {f"{name}_ns": int(value * 1e9) for name, value in times.items()}
        return os.stat_result(
            values,
            {**times, **nanoseconds, "st_blocks": self.stored_blocks(), "st_blksize": 4096},
        )

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system ``/``."""
        return os.statvfs("/")

    def stop_fetching(self) -> None:
        """Make all reads fail, those that wait and later ones."""
        self.close()

    def close(self) -> None:
        """Close the connections; reads that wait fail.  A second call does nothing."""
        self._links.close()
        self._closed.set()


class _Attempts:
    """The attempts of one read.

    Attributes:
        end: When the read fails at the latest (`time.monotonic`).
    """

    def __init__(self, name: str, deadlines: Deadlines, outages: OutageLog) -> None:
        self.end = time.monotonic() + deadlines.total_seconds
        self._name = name
        self._outages = outages
        self._pause = _FIRST_PAUSE_SECONDS
        self._count = self._protocol_errors = 0

    def failed(self, error: BrokenError | RefusedError | ReplyError, *, is_closed: bool) -> float:
        """Return how long to wait before the next attempt.

        Raises:
            RemoteError: No further attempt is made.
        """
        self._count += 1
        if isinstance(error, RefusedError):
            raise self._final(str(error), error.errno) from error
        if isinstance(error, ReplyError) and error.errno != errno.ESHUTDOWN:
            text = f"{os.strerror(error.errno)} ({error.text})" if error.text else ""
            msg = f"{self._name}: read: found an error of the server: "
            raise RemoteError(msg + (text or os.strerror(error.errno)), error.errno) from error
        self._protocol_errors += isinstance(error, ProtocolError)
        seconds = self._pause * random.uniform(0.5, 1)  # noqa: S311  no secret
        is_late = time.monotonic() + seconds >= self.end
        if is_closed or is_late or self._protocol_errors >= _MAX_PROTOCOL_ERRORS:
            msg = f"{error} (attempts: {self._count})"
            raise self._final(msg, errno.EIO) from error
        if self._count == 1:
            # Most likely the connection was idle and the server has closed it.
            return 0
        self._pause = min(_MAX_PAUSE_SECONDS, 2 * self._pause)
        return seconds

    def _final(self, text: str, number: int) -> RemoteError:
        """Return the error of the read, after recording it as the beginning of an outage."""
        msg = f"{self._name}: {text}"
        is_other = number == errno.ESTALE
        failure = ObjectChangedError(msg) if is_other else RemoteError(msg, number)
        self._outages.failed(failure)
        return failure


class _Parts:
    """The requests for a range, whose offsets and lengths are those that the server allows."""

    def __init__(self, export: Export, offset: int, view: memoryview) -> None:
        block = export.min_block_bytes
        step = min(_MAX_REQUEST_BYTES, export.max_payload_bytes) // block * block
        first = offset // block * block
        end = offset + len(view)
        last = -(-end // block) * block
        self._target = view
        self._whole: memoryview | None = None
        self._skip = offset - first
        if (first, last) != (offset, end):
            self._whole = memoryview(bytearray(last - first))
            view = self._whole
        self.requests: Sequence[Request] = [
            Read(first + at, view[at : at + step]) for at in range(0, last - first, step)
        ]

    def finish(self) -> None:
        """Copy what was read to where it goes, if it is not there.

        Raises:
            ReplyError: The server has answered a request with an error.
        """
        for request in self.requests:
            if request.failure is not None:
                raise request.failure
        if self._whole is not None:
            self._target[:] = self._whole[self._skip : self._skip + len(self._target)]
