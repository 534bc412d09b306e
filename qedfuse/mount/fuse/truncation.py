"""truncate(2) and open(2) with O_TRUNC on a disk, which never becomes smaller.

The kernel sends both as a SETATTR request with the new size, because
`qedfuse.mount.fuse.fuseinit` removes the feature FUSE_ATOMIC_O_TRUNC.

- A larger size grows the disk if the option ``growable`` is set.
- A smaller size is refused by default.  A program that has truncated a file does not write the
  zeros that it expects past the new end, so the old data of the disk would stay there.
- With ``truncate=zero`` a smaller size zeroes the range from this size to the end of the disk, as a
  discard does, and the disk keeps its size.

After zeroing, the kernel must drop its cached pages of the disk.  But while the kernel waits for
the reply to SETATTR, it holds the lock of the inode and sends no dirty page (FUSE_NOWRITE in
fs/fuse).  It cannot drop a dirty page that it has not sent.  Therefore with ``truncate=zero`` the
write-back cache is off, so that only a shared memory map can make pages dirty.  Two cases remain:

- If no page is dirty, the kernel drops all pages before the reply, which gives the real size.
- If a page is dirty, the reply gives the requested size.  This makes the kernel drop all pages past
  this size without writing the dirty ones back.  The attributes in this reply expire immediately,
  so the kernel gets the real size with its next request, which `SizeFixup` causes.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from pyfuse3 import FUSEError

from qedfuse.ondisk.constants import SECTOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)


class Truncation:
    """Carries out or refuses changes of size, as the options ``growable`` and ``truncate`` say."""

    def __init__(
        self, options: MountOptions, try_drop_pages: Callable[[ExportedDisk], Awaitable[bool]]
    ) -> None:
        """Handle changes of size; ``try_drop_pages`` is `Laundering.try_drop_pages`."""
        self._options = options
        self._try_drop_pages = try_drop_pages
        self._explained: set[int] = set()

    async def set_size(self, exported: ExportedDisk, size: int) -> bool:
        """Carry out a SETATTR request for ``size`` bytes.

        Returns:
            True if the reply to the kernel must give the real size of the disk.  False if the reply
            must give ``size``, in attributes that expire immediately.

        Raises:
            FUSEError: EPERM, this size is not permitted; EFBIG, as in `grow`.
            QedError: The disk could not be changed; part of the range may be zeroed.
        """
        disk = exported.disk
        if size == disk.size:
            return True
        if size == exported.fixup_size and size < disk.size:
            # `SizeFixup` has caused this request, and the disk has grown since.  No user has
            # truncated the disk, so its data must stay.
            raise FUSEError(errno.EPERM)
        if size == 0 or (size < disk.size and self._options.truncate == "zero"):
            return await self._zero_from(exported, size)
        if size < disk.size or not self._options.growable or exported.is_partition:
            raise FUSEError(errno.EPERM)
        await self.grow(exported, size)
        return True

    async def grow(self, exported: ExportedDisk, end: int) -> None:
        """Grow a disk to ``end`` bytes, rounded up to whole sectors.

        Does nothing if the disk may grow and is that large already.

        Raises:
            FUSEError: ENOSPC, the file may not grow; EFBIG, the tables cannot address the size.
            QedError: The disk could not be changed.
        """
        if not self._options.growable or exported.is_partition:
            raise FUSEError(errno.ENOSPC)
        size = -(-end // SECTOR) * SECTOR
        if size > exported.whole_disk.header.geometry.max_image_size:
            raise FUSEError(errno.EFBIG)
        if size > exported.whole_disk.size:
            await exported.whole_disk.grow(size)

    async def _zero_from(self, exported: ExportedDisk, start: int) -> bool:
        """Zero a disk from guest offset ``start`` to its end; return the result of `set_size`."""
        if self._options.truncate == "refuse":
            self._explain(exported)
            raise FUSEError(errno.EPERM)
        try:
            await exported.disk.discard(start, exported.disk.size - start)
        finally:
            # Also after a failure, because a part of the range may be zeroed.  If the kernel cannot
            # drop the pages before the reply, the launderer (a helper process) goes on waiting for
            # that.  After a reply with an error the kernel then writes the dirty pages back, and
            # drops all pages.
            dropped = await self._try_drop_pages(exported)
        return dropped

    def _explain(self, exported: ExportedDisk) -> None:
        """Log the alternatives to a refused truncation, unless logged for this disk before."""
        if exported.inode not in self._explained:
            self._explained.add(exported.inode)
            _log.warning(
                "%s: an open with O_TRUNC, or a truncation to 0, was refused and nothing is "
                "changed, because a disk keeps its size; write with conv=notrunc or qedimg "
                "convert -n, or mount with -o truncate=zero to fill the disk with zeros",
                exported.disk.name,
            )
