"""Reads of the cache's data file from the page cache, without a comparison with the checksum.

A unit becomes ready when this process has fetched and stored it, or has read it from the disk and
compared it with its checksum (`UnitFile.load`).  From then on, this module reads the unit, as long
as the page cache has it.  When the page cache has lost a page, the disk may return other bytes,
because bits have flipped or a write has failed.  So this module must read only what is in the page
cache.

A read with ``RWF_NOWAIT`` alone would not ensure that.  There are three dangers, each with its
remedy:

- A read that misses the page cache can make the kernel read from the disk.  If the disk answers
  before the kernel looks for the bytes again, the same call returns the bytes; if not, the next
  read returns them.  Three rules prevent such reads.  A read is tried only if the kernel reports
  that the page cache has all of its bytes.  A miss makes the units of the range not ready
  (`RemoteFile`).  The kernel's readahead is off (`UnitFile`).
- The kernel returns zeros for a hole of the file without reading from the disk, and a failed write
  can leave a hole.  So a block of zeros counts as a miss, unless the block is known to be zeros in
  the object (`ZeroBlocks`).
- Another program may have truncated the file.  A later write makes it longer again, with a hole,
  but never as long as it was (`qedfuse.remote.sharing`).  So the length shows that the file was
  truncated.  It is checked before and after the read.

By these rules a miss in one process brings no unchecked bytes into the page cache, where another
process that uses the same entry could read them.

The mount's extension in C reads the file by the same rules (``_checkedunits.c``), with fewer calls.
It compares the length after a read with the length after the previous read, and it prefers
cachestat(2) to mincore(2).  A page in the page cache can be *invalid*: the kernel is reading it
from the disk, or has failed to write it.  cachestat(2) counts such a page, but mincore(2) does not.
A read with ``RWF_NOWAIT`` does not return the page, but splice(2) would read it from the disk.  So
the extension calls mincore(2) before splice(2).  It omits this call for a unit whose pages cannot
become invalid any more: an earlier mincore(2) has found all of them valid, none of them was then
waiting to be written to the disk, and no other process has the entry open.

Bytes that were not compared can still be returned in these cases:

- Another program has read a block from a damaged disk into the page cache, or is reading it.
- Between the check of the page cache and the read of this module, the kernel drops a block, and
  another program makes it read the block from the disk.
- `UnitFile.load` reads a unit a second time, through the page cache, after it has compared the
  unit, and the disk returns other bytes this time.  Until `load` has compared and dropped these
  bytes, another process in which the unit is ready can read them.  Writing the compared bytes into
  the page cache instead would write each such unit to the disk again.
- The file system does not support reads around the page cache, so `UnitFile.load` reads a damaged
  unit through the page cache.  Until `load` has dropped the unit, another process in which the unit
  is ready can read it.
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.remote.unitfile import UnitFile
    from qedfuse.remote.zeroblocks import ZeroBlocks


class LocalData:
    """The data file of an entry of the cache, open for reading.

    The object has a duplicate of the entry's descriptor, because the fetcher closes an entry that
    is damaged.  Threads may read concurrently.  After `close`, the duplicate is closed when the
    last read has returned.

    Attributes:
        is_readable: Whether the page cache is read.  False if calls may wait for a server (NFS,
            FUSE), because reads run in the event loop; also False if blocks of the file system are
            smaller than `BLOCK_BYTES`, because then a hole may be too small to be recognised.
    """

    def __init__(self, entry: UnitFile) -> None:
        """Duplicate the descriptor of ``entry``, which must be open, and map the data file.

        Raises:
            OSError: The host has no free descriptor, or refused another call, such as the mapping.
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
            os.close(self._fd)
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

        The result has the bare descriptor, and the address of the mapping, which are valid until
        `close`.  That suffices: the extension reads only during requests to a disk, and a disk
        closes its files after its last request.  The fetcher closes only its own descriptor when it
        finds that the file was truncated.

        Args:
            ready: Which units may be read; see `UnitStore.ready`.
            zeros: The blocks of the object that are known to be zeros.
            content_bytes: The length of the object in bytes.
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

        ``zeros`` has the blocks of the object that are known to be zeros.

        Returns False if a byte is not in the page cache or may be in a hole, if the file system
        does not support such reads, or if the file was truncated or closed; the caller cannot
        distinguish these cases.  The content of ``view`` is undefined then.
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
        """Fill ``view`` from the page cache; see `try_read`.

        Raises:
            OSError: A system call failed, or the kernel has dropped the first page from the page
                cache since `Residency.has_range` found it there.
        """
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
            return True  # this object does not read the file, and on NFS lseek(2) may wait
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

        If calls may wait for a server, or after `close`, the attributes are those that the file
        system had when this object was made.

        Raises:
            OSError: A system call failed.
        """
        if self._waits_for_server or not self._use.enter():
            return self._space
        try:
            return os.fstatvfs(self._fd)
        finally:
            self._use.leave()

    def close(self) -> None:
        """Close the file when the running reads have returned, without waiting for them.

        A second call does nothing.
        """
        self._use.close()

    def _close_files(self) -> None:
        self._residency.close()
        os.close(self._fd)
