"""truncate(2) and open(2) with O_TRUNC on a disk, whose size is fixed.

The kernel does not send O_TRUNC in the open request (see `qedfuse.mount.fuse.fuseinit`); a
SETATTR request with the size 0 follows, as for truncate(2).  By default it is refused.  A
program that has truncated a file to 0 successfully leaves out the zeros that it copies, and
old bytes would remain in those ranges.  With ``truncate=zero`` the disk is zeroed, as by a
discard of all of it, and keeps its size.  A truncation to a size between 0 and that of the
disk zeroes the range past it: cp(1) makes one for a source that ends in a hole.  The range
that was cut off reads as zeros, as in a file that is truncated and made longer again.

The pages in the kernel's cache have to be dropped as well.  While the kernel waits for the
reply to SETATTR, it holds the lock of the inode and sends no dirty page (FUSE_NOWRITE in
fs/fuse).  So with ``truncate=zero`` the write-back cache is off: then only a shared memory map
makes pages dirty.

- Without dirty pages the kernel drops all pages before the reply, when it is asked to, and
  the reply gives the size that the disk still has.
- With a dirty page the kernel cannot do that before the reply: it would have to write the
  page back first.  Then the reply gives the requested size, and the kernel drops all pages
  past it by itself, the dirty ones without writing them back.  The attributes in this reply
  expire immediately, so the next request for the size or for data past it gets the real size.
  `SizeFixup` makes such a request right after, in case no program does.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from pyfuse3 import FUSEError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


class Truncation:
    """Changes the size of a disk, or refuses to, by the options ``growable`` and ``truncate``."""

    def __init__(
        self, options: MountOptions, try_drop_pages: Callable[[ExportedDisk], Awaitable[bool]]
    ) -> None:
        """Set the options of the mount.

        Args:
            options: The options.
            try_drop_pages: Has the kernel drop the pages that it has cached of a disk; returns
                False if it did not within a short time.
        """
        self._options = options
        self._try_drop_pages = try_drop_pages
        self._explained: set[int] = set()

    async def set_size(self, exported: ExportedDisk, size: int) -> bool:
        """Carry out a SETATTR request for ``size`` bytes.

        Returns:
            Whether the reply to the kernel must give the real size.  Otherwise it must give
            ``size``, in attributes that expire immediately.

        Raises:
            FUSEError: EPERM, the options do not allow it; EFBIG, the tables cannot address the
                size.
            QedError: The disk could not be changed; part of the range may be zeroed.
        """
        disk = exported.disk
        if size == disk.size:
            return True
        if size == exported.correcting and size < disk.size:
            # The disk has grown since `SizeFixup` read its size; no user wants a truncation.
            raise FUSEError(errno.EPERM)
        if size == 0 or (size < disk.size and self._options.truncate == "zero"):
            return await self._zero_from(exported, size)
        if size < disk.size or not self._options.growable:
            raise FUSEError(errno.EPERM)
        if size > disk.header.geometry.max_image_size:
            raise FUSEError(errno.EFBIG)
        await disk.resize(size)
        return True

    async def _zero_from(self, exported: ExportedDisk, start: int) -> bool:
        """Zero a disk from an offset to its end; the result is that of `set_size`."""
        if self._options.truncate == "refuse":
            self._explain(exported)
            raise FUSEError(errno.EPERM)
        try:
            await exported.disk.discard(start, exported.disk.size - start)
        finally:
            # Also after a failure: programs must see the content that the disk has now, if not
            # before the reply, then as soon as dirty pages have been written back.
            dropped = await self._try_drop_pages(exported)
        return dropped

    def _explain(self, exported: ExportedDisk) -> None:
        """Log the alternatives to a refused truncation, once for each disk."""
        if exported.inode not in self._explained:
            self._explained.add(exported.inode)
            _log.warning(
                "%s: an open with O_TRUNC, or a truncation to 0, was refused and nothing is "
                "changed: a disk keeps its size; write with conv=notrunc or qedimg convert -n, "
                "or mount with -o truncate=zero to have the disk emptied",
                exported.disk.name,
            )
