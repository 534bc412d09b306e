"""Answering the reads, writes and fsyncs that the C extension passes on before pyfuse3 gets them.

A long read whose data is in the host's page cache is answered with the pages of the cache, without
a copy into this process.  A read that must wait for the host's disk is *deferred*: a native thread
reads the data and answers the kernel, without the event loop and without a task of pyfuse3; if it
fails, a task of this module answers.  All other requests that must wait or fail are left to pyfuse3
and `Operations`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import trio
from pyfuse3 import FUSEError

from qedfuse.mount.fuse.requestcounters import READ

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.datapath.readtables import ReadTables
    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.fuse.operations import Operations

_MIN_SPLICE_BYTES: Final = 1 << 15
_MAX_SPLICE_BYTES: Final = 1 << 19
"""Minimum and maximum length of a read for which `reply_from_file` is called (``_extraops.h``)."""


class DataRequests:
    """Answers the requests that `_dataops.c` passes on; see `FastRequests` for the results."""

    def __init__(
        self,
        operations: Operations,
        reply_from_file: Callable[[int, int], bool],
        defer_read: Callable[[], Request],
        nursery: trio.Nursery,
    ) -> None:
        """Serve the disks of ``operations``.

        Args:
            operations: The handlers of the requests of the mount.
            reply_from_file: Answers the present read with the bytes at an offset of a descriptor;
                returns False if that would wait or is not possible.
            defer_read: Returns an object that answers the present read.
            nursery: Runs the tasks of `answer_slowly`.
        """
        self._disk_of = operations.fast.disk_of
        self._operations = operations
        self._nursery = nursery
        self._reply_from_file = reply_from_file
        self._defer_read = defer_read
        self._deferred = 0  # number of deferred reads whose threads have not ended
        self._drained = trio.Event()
        self.write = operations.fast.write
        self.fsync = operations.fast.fsync

    def read(self, handle: int, offset: int, size: int) -> memoryview | None:
        """Answer a read of ``size`` bytes at guest offset ``offset``.

        Returns:
            The bytes to answer with.  None if the read is answered or deferred, or if pyfuse3
            must get it; the extension knows which.
        """
        exported = self._disk_of(handle)
        if exported is None:
            return None
        if _MIN_SPLICE_BYTES <= size <= _MAX_SPLICE_BYTES:
            location = exported.disk.try_locate(offset, size)
            if location is not None:
                fd, file_offset, file = location
                if self._reply_from_file(fd, file_offset):
                    exported.disk.count_read(file, size)
                    return None
        is_tried = exported.disk.should_try_read  # False after several misses in the page cache
        if not is_tried and self._defer(exported, handle, offset, size):
            return None
        content = exported.disk.try_read(offset, size)
        if content is None and is_tried:
            self._defer(exported, handle, offset, size)
        return content

    def _defer(self, exported: ExportedDisk, handle: int, offset: int, size: int) -> bool:
        """Defer the present read, if possible; return whether that was done."""
        read = _DeferredRead(self, exported, handle, offset, size)
        try:
            exported.disk.try_start_read(offset, size, read.take_answer, read.ended)
        except Exception:
            if not read.is_taken:
                raise
            # No thread reads, but pyfuse3 does not get the read any more.  Any result that is not
            # the size makes `_answer` answer it.
            read.ended(-1)
        return read.is_taken

    def tables_for_reads(self) -> dict[int, ReadTables]:
        """Return, by inode number, the objects with which the extension can answer reads itself."""
        disks = self._operations.fast.disks
        return {inode: exported.disk.tables_for_reads() for inode, exported in disks.items()}

    async def drain(self) -> None:
        """Wait until all deferred reads have ended; no request may arrive meanwhile."""
        while self._deferred:
            await self._drained.wait()

    def take_read(self) -> Request:
        """Keep the present read from pyfuse3; return the object that answers the read."""
        pending = self._defer_read()
        self._deferred += 1
        return pending

    def read_ended(self, read: _DeferredRead, pending: Request | None) -> None:
        """Note that the thread of a deferred read has ended.

        ``pending`` is the object that must still answer the read; None if the thread answers.
        """
        self._deferred -= 1
        if not self._deferred:
            self._drained.set()
            self._drained = trio.Event()
        if pending is not None:
            self.answer_slowly(pending, read.handle, read.offset, read.size)

    def answer_slowly(self, pending: Request, handle: int, offset: int, size: int) -> None:
        """Let a task answer a read that has failed in a thread, or in the io_uring of the mount."""
        self._nursery.start_soon(self._answer, pending, handle, offset, size)

    async def _answer(self, pending: Request, handle: int, offset: int, size: int) -> None:
        """Answer a read on the slow path, which reads the bytes again."""
        try:
            content = await self._operations.read_slowly(handle, offset, size)
        except FUSEError as error:
            pending.error(error.errno)
        else:
            pending.data(content)


class _DeferredRead:
    """A read, from the attempt to defer it to its answer.

    Attributes:
        handle: The file handle.
        offset: Guest offset.
        size: Number of bytes.
        pending: The object that answers the read; None while the read is not deferred.
    """

    __slots__ = ("_counters", "_requests", "_start", "handle", "offset", "pending", "size")

    def __init__(
        self, requests: DataRequests, exported: ExportedDisk, handle: int, offset: int, size: int
    ) -> None:
        self._requests = requests
        self._counters = exported.counters
        self._start = time.perf_counter_ns()
        self.handle = handle
        self.offset = offset
        self.size = size
        self.pending: Request | None = None

    @property
    def is_taken(self) -> bool:
        """Whether the read has been deferred."""
        return self.pending is not None

    def take_answer(self) -> object:
        """Defer the read; return the capsule with which a thread answers it."""
        self.pending = self._requests.take_read()
        return self.pending.capsule()

    def ended(self, result: int) -> None:
        """Note that the thread has ended with a number of bytes, or a negative errno.

        If all bytes were read, the thread answers; otherwise the slow path answers and counts.
        """
        if result == self.size:
            self._counters.count(READ, self.size, self._start)
        self._requests.read_ended(self, None if result == self.size else self.pending)
