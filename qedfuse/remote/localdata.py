"""Reads of a remote file's local copy from the page cache, without comparing checksums.

The copy is the data file of an entry of the cache for remote files.  A unit (a part of the file)
becomes ready when this process has fetched and stored it, or has read it from the disk and compared
it with its checksum (`UnitFile.load`).  From then on, this module reads the unit.  When the page
cache has lost a page, the disk may return other bytes, because bits have flipped or a write has
failed.  So this module must read only what is in the page cache.

A read with ``RWF_NOWAIT`` alone would not ensure that.  There are three dangers, each with its
remedy:

- A read that misses the page cache can make the kernel read from the disk, and this read or the
  next one returns the bytes.  So a read is tried only if the kernel reports that the page cache has
  all of its bytes.  A miss makes the units of the range not ready (`RemoteFile`).  The kernel's
  readahead is off (`UnitFile`).
- The kernel returns zeros for a hole of the file without reading from the disk, and a failed write
  can leave a hole.  So a block of zeros counts as a miss, unless the block is known to be zeros in
  the remote file (`ZeroBlocks`).
- Another program may have truncated the file.  A later write makes it longer again, with a hole,
  but not as long as it was, because its last byte is never written by a store of a unit
  (`qedfuse.remote.sharing`).  So the length is checked before and after the read.

By these rules a miss in one process brings no unchecked bytes into the page cache, where another
process that uses the same entry could read them.  docs/remote.md lists the cases in which bytes
that were not compared can still be returned.

The mount's extension in C reads the file by the same rules (``_checkedunits.c``), with fewer calls.
A page in the page cache can be *invalid*: the kernel is reading it from the disk, or has failed to
write it.  cachestat(2) counts such a page, but mincore(2) does not.  A read with ``RWF_NOWAIT``
does not return the page, but splice(2) would read it from the disk.  So before splice(2) the
extension calls mincore(2), unless the kernel has written the units to the disk.  Before other reads
it calls cachestat(2), if the kernel has it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.hostio.pagesource import CheckedUnits, PageSource
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.hostio.residency import Residency
from qedfuse.hostio.systemcalls import inline_flags, waits_for_server
from qedfuse.remote.sharing import ALONE_BYTES, SHARED_BYTES, has_length
from qedfuse.remote.unitfile import UNIT_BYTES
from qedfuse.remote.zeroblocks import BLOCK_BYTES
from qedfuse.util.deferredclose import DeferredClose
from qedfuse.util.descriptors import close_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.remote.unitfile import UnitFile
    from qedfuse.remote.zeroblocks import ZeroBlocks


class LocalData:
    """The data file of an entry of the cache, open for reading.

    This class has a duplicate of the entry's descriptor, because a damaged entry is closed while
    reads may still run.  Threads may read concurrently.  After `close`, the duplicate is closed
    when the last read has returned.

    Attributes:
        is_readable: Whether the page cache is read.  False if calls may wait for a server (NFS,
            FUSE), because reads run in the event loop.  Also False if blocks of the file system are
            smaller than `BLOCK_BYTES`: a hole could be too small to be recognised.
    """

    def __init__(self, entry: UnitFile) -> None:
        """Duplicate the descriptor of ``entry``, which must be open, and map the data file.

        Raises:
            OSError: A system call failed.
        """
        self._fd = os.dup(entry.data_fd)
        self._size = entry.size
        try:
            self._flags = inline_flags(self._fd)
            self._space = os.fstatvfs(self._fd)
            self._waits_for_server = waits_for_server(self._fd)
            # The mapping comes last, because a failure must not leave it behind.
            self._residency = Residency(self._fd, self._size + SHARED_BYTES)
        except BaseException:
            close_descriptors((self._fd,))
            raise
        self._use = DeferredClose(self._close_files)
        self.is_readable = not self._waits_for_server and self._space.f_bsize >= BLOCK_BYTES

    def page_source(
        self,
        ready: bytearray,
        zeros: ZeroBlocks,
        content_bytes: int,
        forget: Callable[[int, int], object],
    ) -> PageSource | None:
        """Return what the mount's extension needs to read the file; None unless `is_readable`.

        The result is valid until `close`, because it has the bare descriptor and the address of the
        mapping.  The extension reads only during requests to a disk, and a disk closes its files
        after its last request.

        Args:
            ready: Which units may be read; see `UnitStore.ready`.
            zeros: The blocks of the remote file that are known to be zeros.
            content_bytes: The length of the remote file in bytes.
            forget: Called with the first and the last unit of a read that failed.
        """
        if not self.is_readable:
            return None
        bits = UNIT_BYTES.bit_length() - 1
        units = CheckedUnits(
            *(ready, zeros.masks, bits, content_bytes, self._size + ALONE_BYTES),
            *(self._residency.address, forget),
        )
        return PageSource(ReadPolicy(), self._fd, units, flags=self._flags)

    def try_read(self, offset: int, view: memoryview, zeros: ZeroBlocks) -> bool:
        """Fill ``view`` from the page cache; return whether that succeeded.

        ``zeros`` has the blocks of the remote file that are known to be zeros.

        Returns False if a byte is not in the page cache or may be in a hole, if the file system
        does not support such reads, or if the file was truncated or closed.  The content of
        ``view`` is undefined then.
        """
        if not self.is_readable:
            return False
        if not self._use.enter():
            return False
        try:
            return self._try_read(offset, view, zeros)
        except OSError:
            return False
        finally:
            self._use.leave()

    def _try_read(self, offset: int, view: memoryview, zeros: ZeroBlocks) -> bool:
        """Fill ``view`` from the page cache; see `try_read`."""
        length = os.lseek(self._fd, 0, os.SEEK_END)
        return (
            has_length(length, self._size)
            and self._residency.has_range(offset, len(view))
            and os.preadv(self._fd, (view,), offset, self._flags) == len(view)
            and os.lseek(self._fd, 0, os.SEEK_END) == length
            and not zeros.may_have_holes(offset, view)
        )

    def is_whole(self) -> bool:
        """Return whether the file was never truncated; later writes do not make it whole again.

        Returns True if this object is closed or not `is_readable`, and False if the host refuses.
        """
        if not self.is_readable:
            return True  # on NFS lseek(2) may wait
        if not self._use.enter():
            return True
        try:
            return has_length(os.lseek(self._fd, 0, os.SEEK_END), self._size)
        except OSError:
            return False
        finally:
            self._use.leave()

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system of the cache, without waiting for a server.

        If calls may wait for a server or fail, or after `close`, the attributes are those that the
        file system had when this object was made.
        """
        if self._waits_for_server or not self._use.enter():
            return self._space
        try:
            return os.fstatvfs(self._fd)
        except OSError:
            return self._space
        finally:
            self._use.leave()

    def close(self) -> None:
        """Close the file when the running reads have returned, without waiting for them.

        A second call does nothing.
        """
        self._use.close()

    def _close_files(self) -> None:
        """Close the files; errors are ignored, as in `UnitFile`."""
        self._residency.close()
        close_descriptors((self._fd,))
