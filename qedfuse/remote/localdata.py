"""Reads of the cache's data file, which fail if the file was cut or closed meanwhile."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qedfuse.errors import HostError
from qedfuse.hostio.pagesource import CheckedUnits, PageSource
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.remote.unitfile import DATA_NAME, UNIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.remote.unitfile import UnitFile


class LocalData:
    """The data file of an entry of the cache, open for reading.

    It has a descriptor of its own, because the fetcher closes that of an entry that is damaged.
    Every method except `try_read` may be called by threads concurrently; the descriptor is closed
    when the last read has returned.
    """

    def __init__(self, entry: UnitFile) -> None:
        """Read the data of ``entry``, which must be open.

        Raises:
            OSError: The host has no further descriptor.
        """
        path = os.path.join(entry.path, DATA_NAME)  # noqa: PTH118  str paths
        self._file = PosixFile(os.dup(entry.data_fd), path, writable=False)
        self._file_bytes = entry.file_bytes
        self._lock = threading.Lock()
        self._users = 1
        self._is_closed = False

    def page_source(self, ready: bytearray, content_bytes: int) -> PageSource:
        """Return how the mount's extension reads the file.

        Args:
            ready: For each unit 1 if it may be read, otherwise 0.
            content_bytes: The length of the object.
        """
        bits = UNIT_BYTES.bit_length() - 1
        units = CheckedUnits(ready, bits, content_bytes, self._file_bytes)
        return PageSource(self._file.read_policy, self._file.fd, units)

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` without blocking; return whether that succeeded.

        Only the thread that calls `close` may call this.
        """
        file = self._file
        return file.try_read(offset, view) and os.lseek(file.fd, 0, 2) == self._file_bytes

    async def read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view``; return False if the file is closed, has lost the bytes or was cut."""
        with self._in_use() as is_open:
            try:
                return (
                    is_open
                    and await self._file.pread_into(offset, view) == len(view)
                    and self._is_whole()
                )
            except HostError:
                return False

    def read_blocking(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` in a thread; see `read`."""
        with self._in_use() as is_open:
            try:
                return (
                    is_open
                    and self._file.read_blocking(offset, view) == len(view)
                    and self._is_whole()
                )
            except HostError:
                return False

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system of the cache."""
        return self._file.statvfs()

    def close(self) -> None:
        """Close the file, when the reads that are running have returned.

        A second call does nothing.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._leave()

    def _is_whole(self) -> bool:
        """Return whether the file still has its length.

        A file that was cut never has it again (`UnitFile`).  So if this is true after a read, the
        read was not one of a hole that a later write has left.
        """
        try:
            return os.lseek(self._file.fd, 0, os.SEEK_END) == self._file_bytes
        except OSError:
            return False

    @contextmanager
    def _in_use(self) -> Iterator[bool]:
        """Keep the file open for the block; yield whether it is open."""
        with self._lock:
            is_open = not self._is_closed
            self._users += is_open
        try:
            yield is_open
        finally:
            if is_open:
                self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            is_last = not self._users
        if is_last:
            self._file.close()
