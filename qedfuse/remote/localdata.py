"""Reads of the cache's data file from the page cache, the only ones that need no checksum.

A unit is compared with its checksum when it is read from the disk (`UnitFile.load`), and then read
here as often as the page cache has it.  So what the disk returns is never used unchecked, also if
bits have flipped on it or a write has failed since.

Three things can make a read with ``RWF_NOWAIT`` return what was not compared:

- A read that misses starts reading from the disk, and the next one finds what came.  So after a
  miss, the units of the range are not ready (`RemoteFile`), and nothing is read ahead (`UnitFile`).
- The kernel answers from a hole without reading from the disk.  A failed write can leave one.  So a
  block of zeros counts as a miss, unless a comparison has shown that it belongs to the object
  (`ZeroBlocks`).
- The file was cut, and a later write has made it longer.  So its length is compared after the read.

While other processes use the entry as well, a miss of one must not bring bytes into the page cache
that another reads there.  So then a read is only tried if mincore(2) says that all of it is there.

The extension of the mount reads the file by the same rules (``_checkedunits.c``).

What is left is a block that another program has read from a damaged disk into the page cache; and
one that the kernel drops and reads again in the microsecond between a look at the page cache and
the read.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qedfuse.hostio.pagesource import CheckedUnits, PageSource
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.hostio.residency import Residency
from qedfuse.hostio.systemcalls import waits_for_server
from qedfuse.remote.sharing import ALONE_BYTES, SHARED_BYTES, has_length
from qedfuse.remote.unitfile import UNIT_BYTES
from qedfuse.remote.zeroblocks import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.remote.unitfile import UnitFile
    from qedfuse.remote.zeroblocks import ZeroBlocks


class LocalData:
    """The data file of an entry of the cache, open for reading.

    It has a descriptor of its own, because the fetcher closes that of an entry that is damaged.
    Threads may read concurrently; the descriptor is closed when the last read has returned.

    Attributes:
        is_readable: Whether the page cache is read.  False if calls may wait for a server (NFS,
            FUSE), since reads run in the event loop.
    """

    def __init__(self, entry: UnitFile) -> None:
        """Read the data of ``entry``, which must be open.

        Raises:
            OSError: The host has no further descriptor, or refused.
        """
        self._fd = os.dup(entry.data_fd)
        self._size = entry.size
        self._lock = threading.Lock()
        self._users = 1
        self._is_closed = False
        try:
            self._space = os.fstatvfs(self._fd)
            self._residency = Residency(self._fd, self._size + SHARED_BYTES)
        except OSError:
            os.close(self._fd)
            raise
        self._waits_for_server = waits_for_server(self._fd)
        self.is_readable = not self._waits_for_server and self._space.f_bsize >= BLOCK_BYTES

    def page_source(
        self,
        ready: bytearray,
        zeros: ZeroBlocks,
        content_bytes: int,
        forget: Callable[[int, int], object],
    ) -> PageSource | None:
        """Return how the mount's extension reads the file; None if the page cache is not read.

        Args:
            ready: For each unit 1 if it may be read, otherwise 0.
            zeros: The blocks of the object that are known to be zeros.
            content_bytes: The length of the object.
            forget: Called with the first and the last unit of a read that failed.
        """
        if not self.is_readable:
            return None
        bits = UNIT_BYTES.bit_length() - 1
        units = CheckedUnits(
            *(ready, zeros.masks, bits, content_bytes, self._size + ALONE_BYTES),
            *(self._residency.address, forget),
        )
        return PageSource(ReadPolicy(), self._fd, units)

    def try_read(self, offset: int, view: memoryview, zeros: ZeroBlocks) -> bool:
        """Fill ``view`` from the page cache; return whether that succeeded.

        ``zeros`` has the blocks of the object that are known to be zeros.
        Returns False without a reason that is known: a byte is not in the page cache or may be in a
        hole, the file system does not support such reads, or the file was cut or closed.
        """
        if not self.is_readable:
            return False
        with self._in_use() as is_open:
            try:
                return is_open and self._try_read(offset, view, zeros)
            except OSError:
                return False

    def _try_read(self, offset: int, view: memoryview, zeros: ZeroBlocks) -> bool:
        """Fill ``view`` from the page cache; see `try_read`.

        Raises:
            OSError: A byte is not there, or the host refused.
        """
        length = os.lseek(self._fd, 0, os.SEEK_END)
        is_alone = length == self._size + ALONE_BYTES
        return (
            has_length(length, self._size)
            and (is_alone or self._residency.has_range(offset, len(view)))
            and os.preadv(self._fd, (view,), offset, os.RWF_NOWAIT) == len(view)
            and os.lseek(self._fd, 0, os.SEEK_END) == length
            and not zeros.may_have_holes(offset, view)
        )

    def is_whole(self) -> bool:
        """Return False if the file was cut.

        A file that was cut never has its length again (`qedfuse.remote.sharing`).
        """
        if not self.is_readable:
            return True  # not known without a call that may wait
        with self._in_use() as is_open:
            try:
                return not is_open or has_length(os.lseek(self._fd, 0, os.SEEK_END), self._size)
            except OSError:
                return False

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system of the cache, without waiting for a server."""
        return self._space if self._waits_for_server else os.fstatvfs(self._fd)

    def close(self) -> None:
        """Close the file, when the reads that are running have returned.

        A second call does nothing.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._leave()

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
            self._residency.close()
            os.close(self._fd)
