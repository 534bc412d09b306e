"""A large file written past the page cache, as good as: what was written soon leaves it.

The host's disk works while the file is being written, so that a later fsync has little
left to wait for.  And the memory of what has arrived there is used again for what comes
next, instead of that of programs and files that somebody still needs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import deque
from time import perf_counter
from typing import Final

from qedfuse.errors import HostError

_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE
_WRITE_AND_WAIT: Final = 7  # SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER
_KEPT: Final = 1 << 27
"""Bytes that may be under way to the host's disk; enough for it never to be without work."""

_FAST: Final = 1 << 29
"""Bytes that the host's disk must take in a second for somebody who does not wait for it."""

_UNSUPPORTED: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.EPERM}

_sync_file_range: Final = ctypes.CDLL(None, use_errno=True).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class WriteBehind:
    """Sends what was written to a file on to the host's disk; for any number of threads.

    Nothing is durable by that: an fsync has to follow.
    """

    def __init__(self, descriptor: int, name: str, *, waits: bool = True) -> None:
        """Look after an open file.

        Args:
            descriptor: The file.
            name: What messages call it.
            waits: An fsync is to follow.  If not, a disk that is slow is left alone: then
                it is the kernel's business when it writes, and memory is there to wait.
        """
        self._descriptor = descriptor
        self._name = name
        self._lock = threading.Lock()
        self._under_way: deque[tuple[int, int]] = deque()
        self._bytes = 0
        self._waits = waits
        self._sent = 0
        self._seconds = 0.0
        self._usable = True

    def wrote(self, offset: int, length: int) -> None:
        """Send a range on; wait for older ones if there is too much under way.

        Args:
            offset: Where in the file it begins, in bytes.
            length: How long it is, in bytes.

        Raises:
            HostError: What was written earlier did not reach the disk.  The kernel tells so
                only once, so that no later fsync would.
        """
        if not self._usable or not length:
            return
        began = perf_counter()
        self._sync(offset, length, _WRITE)
        with self._lock:
            self._sent += length
            self._seconds += perf_counter() - began
            if not self._waits and self._sent > _KEPT and self._sent < _FAST * self._seconds:
                self._usable = False
            self._under_way.append((offset, length))
            self._bytes += length
            old = []
            while self._bytes > _KEPT:
                old.append(self._under_way.popleft())
                self._bytes -= old[-1][1]
        for start, count in old:
            if self._waits:
                self._sync(start, count, _WRITE_AND_WAIT)
            # What has not arrived yet stays where it is.
            os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_DONTNEED)

    def _sync(self, offset: int, length: int, how: int) -> None:
        """Call sync_file_range(2); where it cannot be had the fsync does all."""
        if _sync_file_range(self._descriptor, offset, length, how):
            number = ctypes.get_errno()
            if number not in _UNSUPPORTED:
                error = OSError(number, os.strerror(number))
                raise HostError.from_os(error, self._name, "write")
            self._usable = False
