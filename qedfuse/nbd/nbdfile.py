"""An export of an NBD server as a file of a chain: a read-only `HostFile`."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import RemoteError
from qedfuse.hostio.readonlyfile import ReadOnlyFile
from qedfuse.hostio.serversilence import ServerSilence
from qedfuse.nbd.alignedread import AlignedRead, block_status
from qedfuse.nbd.attempts import Attempts
from qedfuse.nbd.extents import MIN_STEP_BYTES, ExtentMap, SmallSteps
from qedfuse.nbd.failures import BrokenError, RefusedError, ReplyError
from qedfuse.nbd.waiters import pause, pause_blocking
from qedfuse.remote.outagelog import OutageLog
from qedfuse.remote.recentfailures import RecentFailures

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import FileIdentity
    from qedfuse.nbd.connectionpool import ConnectionPool
    from qedfuse.nbd.handshake import Export
    from qedfuse.nbd.requests import BlockStatus
    from qedfuse.remote.options import Deadlines

_UNIT_BYTES = 1 << 18
"""Length of the units for which `RecentFailures` remembers that a read has failed."""
_NOT_SUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOTSUP})
"""The errors with which a server answers that it cannot report extents."""
_MAX_EXTENT_FAILURES: Final = 8
"""After this number of consecutive errors, a server is not asked for extents any more."""


class NbdFile(ReadOnlyFile):
    """An export that is open for reading.

    Attributes:
        path: The URL, or another name of the export.
    """

    def __init__(
        self,
        path: str,
        name: str,
        export: Export,
        connections: ConnectionPool,
        deadlines: Deadlines,
    ) -> None:
        """Prepare to read an export; `qedfuse.nbd.opening.open_nbd` makes the arguments.

        Args:
            path: The URL, or another name of the export.
            name: The name in messages.
            export: The export.
            connections: The connections, which the file closes.
            deadlines: How long to wait for the server.
        """
        super().__init__(name)
        self.path = path
        self._size = export.size
        self._connections = connections
        self._deadlines = deadlines
        self._outages = OutageLog(name, "reads fail until it answers again")
        self._silence = ServerSilence(deadlines.attempt_seconds)
        self._extents = ExtentMap(export.size)
        self._small_steps = SmallSteps(deadlines.total_seconds)
        self._extent_failures = 0  # consecutive
        self._failures = RecentFailures()
        self._opened = time.time()

    @property
    def silence(self) -> ServerSilence:
        """The silence of the server."""
        return self._silence

    @property
    def identity(self) -> FileIdentity:
        """The path and the size; an export has no further property that shows its version."""
        return (self.path, self._size, "")

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return how many bytes were read.

        The result is less than the length of the view only if the file ends earlier.

        Raises:
            RemoteError: The server cannot be reached, answers with an error, or does not serve the
                same export any more; or the file was closed.
            QedError: The function that connects to the server has failed (the argument ``connect``
                of `qedfuse.nbd.opening.open_nbd`).
        """
        length = max(0, min(len(view), self._size - offset))
        if not length:
            await trio.lowlevel.checkpoint()
            return 0
        with self.silence.waiting():
            return await self._fill_from_server(offset, view[:length])

    async def _fill_from_server(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; return its length.

        The file must not end before the view is full.
        """
        length = len(view)
        attempts = self._attempts(offset, length)
        while True:
            sent = time.monotonic()
            try:
                connection = await self._connections.connection(attempts.end)
                read = AlignedRead(connection.export, offset, view[:length])
                await connection.run(read.requests, attempts.end)
                read.finish()
            except (BrokenError, RefusedError, ReplyError) as error:
                seconds = self._pause_seconds(attempts, error, offset, length)
                await pause(self._connections.closed, seconds)
            else:
                self._answered(sent)
                return length

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from a file offset; see `ReadableFile.read_blocking`.

        Raises:
            QedError: See `pread_into`.
            trio.Cancelled: The calling thread is one of trio, and its task was cancelled.
        """
        length = max(0, min(len(view), self._size - offset))
        if not length:
            return 0
        attempts = self._attempts(offset, length)
        while True:
            sent = time.monotonic()
            try:
                connection = self._connections.connection_blocking(attempts.end)
                read = AlignedRead(connection.export, offset, view[:length])
                connection.run_blocking(read.requests, attempts.end)
                read.finish()
            except (BrokenError, RefusedError, ReplyError) as error:
                seconds = self._pause_seconds(attempts, error, offset, length)
                pause_blocking(self._connections.closed, seconds)
            else:
                self._answered(sent)
                return length

    def try_read(self, _offset: int, _view: memoryview) -> bool:
        """Return False, because every read asks the server."""
        return False

    async def next_data(self, offset: int) -> int | None:
        """Return where the first data at or past ``offset`` begins; None if no data follows.

        A range counts as data unless the server reports in time that it reads as zeros.

        Raises:
            QedError: See `pread_into`.
        """
        return await self._find(offset, is_zero=False)

    async def next_hole(self, offset: int) -> int | None:
        """Return where the first hole at or past ``offset`` begins.

        The end of the file counts as a hole.  Returns None if ``offset`` is not before the end.

        Raises:
            QedError: See `next_data`.
        """
        found = await self._find(offset, is_zero=True)
        return self._size if found is None and offset < self._size else found

    def size(self) -> int:
        """Return the file's length in bytes."""
        return self._size

    def stat(self) -> os.stat_result:
        """Return the attributes of a read-only file of this user; all times are that of opening."""
        return self._status(self._opened)

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of ``/``, because no local file system holds the export."""
        return os.statvfs("/")

    def stop_fetching(self) -> None:
        """Make the reads that wait, and all later reads, fail."""
        self.close()

    def close(self) -> None:
        """Close the connections: reads that wait, and later ones, fail."""
        self._connections.close()

    def _answered(self, sent: float) -> None:
        """Record that the server has answered a request that was sent at a time."""
        self._outages.answered(sent)
        self._silence.answered()

    def _attempts(self, offset: int, length: int) -> Attempts:
        """Return a new time limit for a read, short if a read of the same units has just failed."""
        is_brief = self._failures.has_any(*_units(offset, length))
        return Attempts(self.name, self._deadlines, self._outages, is_brief=is_brief)

    def _pause_seconds(
        self,
        attempts: Attempts,
        error: BrokenError | RefusedError | ReplyError,
        offset: int,
        length: int,
    ) -> float:
        """Return how long to wait before the next attempt of a read; raise if none is made."""
        try:
            return attempts.pause_after(error, is_closed=self._connections.is_closed)
        except RemoteError:
            self._failures.record(*_units(offset, length))
            raise

    async def _find(self, offset: int, *, is_zero: bool) -> int | None:
        """Return where the first zeros (``is_zero``) or data begin, from ``offset`` on.

        Zeros may be reported as data.  Returns None if nothing is found.
        """
        await trio.lowlevel.checkpoint()
        end = time.monotonic() + self._deadlines.total_seconds
        while offset < self._size:
            found = self._extents.find(offset)
            if found is None:
                await self._ask_for_extents(offset)
            elif found.is_zero is is_zero:
                return offset
            elif time.monotonic() > end:
                # The time of the search is over, so what was not searched is reported as data.  A
                # later search must not contradict this, so it is recorded as data.  For a search
                # for zeros, which reports that there are none, the whole export is recorded.  For a
                # search for data, these are the zeros from `offset` to `found.end`.
                if is_zero:
                    self._extents.set_all_data()
                    return None
                self._extents.replace(offset, [(found.end - offset, 0)])
                return offset
            else:
                offset = found.end
        return None

    async def _ask_for_extents(self, offset: int) -> None:
        """Ask the server for the extents at ``offset``, and record them.

        The whole export is recorded as data if the server cannot report extents, is too slow, or
        gives no usable answer.  After an error that may pass, only a part of it is.
        """
        attempts = Attempts(self.name, self._deadlines, self._outages)
        start = time.monotonic()
        while True:
            sent = time.monotonic()
            try:
                connection = await self._connections.connection(attempts.end)
                export = connection.export
                if export.context is None:
                    self._extents.set_all_data()
                    return
                request = block_status(export, offset)
                await connection.run([request], attempts.end)
            except (BrokenError, RefusedError) as error:
                seconds = attempts.pause_after(error, is_closed=self._connections.is_closed)
                await pause(self._connections.closed, seconds)
            else:
                self._answered(sent)
                self._record_reply(request, offset)
                is_too_slow = self._small_steps.add_reply(request, time.monotonic() - start)
                # The request begins at the start of the block that contains ``offset``, so a reply
                # can end before ``offset``.  Then another request would not help.
                if is_too_slow or self._extents.find(offset) is None:
                    self._extents.set_all_data()
                return

    def _record_reply(self, request: BlockStatus, offset: int) -> None:
        """Record the extents of a reply; after an error, record data at ``offset``."""
        failure = request.failure
        if failure is None:
            self._extent_failures = 0
            self._extents.replace(request.offset, request.extents)
            return
        self._extent_failures += 1
        is_final = isinstance(failure, ReplyError) and failure.errno in _NOT_SUPPORTED
        if is_final or self._extent_failures >= _MAX_EXTENT_FAILURES:
            self._extents.set_all_data()
        else:
            # The next search at ``offset`` must have the same result.  The range is short, because
            # the server may answer a later request without an error.
            self._extents.replace(offset, [(MIN_STEP_BYTES, 0)])


def _units(offset: int, length: int) -> tuple[int, int]:
    """Return the first and the last unit (`_UNIT_BYTES`) of a range."""
    return offset // _UNIT_BYTES, (offset + length - 1) // _UNIT_BYTES
