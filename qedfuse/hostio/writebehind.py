"""Writing a large file without filling the page cache (write-behind).

Written ranges are sent to the host's disk soon, so that the fsync(2) at the end has little to wait
for.  Older pages are dropped, so that the file does not evict the memory of other programs.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from time import perf_counter
from typing import Final

from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import SYNC_AND_WAIT, SYNC_START, sync_file_range

_MAX_IN_FLIGHT_BYTES: Final = 1 << 27
"""Maximum number of bytes on their way to the host's disk; enough to keep the disk busy."""

_MIN_BYTES_PER_SECOND: Final = 1 << 29
"""The disk counts as slow if fewer bytes were sent for each second spent in sync_file_range(2).

The call only starts the writing, and takes long only if the disk's request queue is full.
"""

_UNSUPPORTED: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE, errno.EPERM}
"""Errors of sync_file_range(2) for a file that does not support the call."""


class WriteBehind:
    """Sends written ranges of a file to the host's disk; any number of threads can use it.

    Sent data is not yet durable: the caller must still call fsync(2).
    """

    def __init__(self, descriptor: int, name: str, *, waits: bool = True) -> None:
        """Serve an open file.

        Args:
            descriptor: The file.
            name: The file's name in messages.
            waits: Whether to wait for the disk when more than `_MAX_IN_FLIGHT_BYTES` are on their
                way.  If False and the disk is slow, all further work is left to the kernel.
        """
        self._descriptor = descriptor
        self._name = name
        self._lock = threading.Lock()
        self._in_flight: deque[tuple[int, int]] = deque()
        self._in_flight_bytes = 0
        self._waits = waits
        self._sent_bytes = 0
        self._sending_seconds = 0.0
        self._usable = True

    def wrote(self, offset: int, length: int) -> None:
        """Start to write a range to the disk, and drop older ranges from the page cache.

        If more than `_MAX_IN_FLIGHT_BYTES` are on their way, this method waits for the oldest
        ranges before it drops them.  With ``waits=False`` it drops only pages that are on the disk.

        Args:
            offset: File offset of the range in bytes.
            length: Length of the range in bytes.

        Raises:
            HostError: Earlier data did not reach the disk.  The kernel reports this error
                only once, so the caller must not rely on a later fsync to report it.
        """
        if not self._usable or not length:
            return
        since = perf_counter()
        self._sync(offset, length, SYNC_START)
        with self._lock:
            self._sent_bytes += length
            self._sending_seconds += perf_counter() - since
            if (
                not self._waits
                and self._sent_bytes > _MAX_IN_FLIGHT_BYTES
                and self._sent_bytes < _MIN_BYTES_PER_SECOND * self._sending_seconds
            ):
                self._usable = False
            self._in_flight.append((offset, length))
            self._in_flight_bytes += length
            old = []
            while self._in_flight_bytes > _MAX_IN_FLIGHT_BYTES:
                old.append(self._in_flight.popleft())
                self._in_flight_bytes -= old[-1][1]
        for start, count in old:
            if self._waits:
                self._sync(start, count, SYNC_AND_WAIT)
            # POSIX_FADV_DONTNEED loses no data, because the kernel keeps dirty pages.
            os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_DONTNEED)

    def _sync(self, offset: int, length: int, flags: int) -> None:
        """Call sync_file_range(2); if it is not supported, leave all later work to the kernel."""
        try:
            sync_file_range(self._descriptor, offset, length, flags)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise HostError.from_os(error, self._name, "write") from error
            self._usable = False
