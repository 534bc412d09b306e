"""truncate(2) and open(2) with O_TRUNC on a disk, which never becomes smaller.

For an open with O_TRUNC the kernel sends an open request without O_TRUNC, and then a SETATTR
request with the size 0, because `qedfuse.mount.fuse.fuseinit` removes the feature
FUSE_ATOMIC_O_TRUNC.  For truncate(2) the kernel sends a SETATTR request with the new size.

A SETATTR request with a larger size grows the disk if the option ``growable`` is set.  Without
this option, and for a partition, the request is refused.  A disk has whole sectors, so the size is
rounded up, as for a write or an fallocate(2) past the end.  The reply gives the rounded size.

By default a request with a smaller size is refused.  After a truncation a program expects an empty
file, and need not write zeros into it.  So if the request succeeded and zeroed nothing, old bytes
would remain where the program expects zeros.

With ``truncate=zero`` a request with a smaller size zeroes the range from the requested size to
the end of the disk, as a discard does, and the disk keeps its size.  So the range reads as in a
file that is truncated and made longer again.  The requested size is not always 0.  For example,
cp(1) opens the disk with O_TRUNC and copies the data.  If the source ends in a hole, cp(1) then
truncates the disk to the size of the source.

After zeroing, the kernel's cached pages of the disk are out of date and must be dropped.  But
while the kernel waits for the reply to SETATTR, it holds the lock of the inode and sends no
dirty page (FUSE_NOWRITE in fs/fuse).  The kernel cannot drop a dirty page that it has not sent.
Therefore with ``truncate=zero`` the write-back cache is off, so that only a shared memory map
can make pages dirty.  Two cases remain:

- If no page is dirty, the server makes the kernel drop all pages before the reply, and the
  reply gives the size that the disk still has.
- If a page is dirty, the kernel cannot drop all pages before the reply.  Then the reply gives
  the requested size, which makes the kernel drop all pages past this size without writing the
  dirty ones back.  The attributes in this reply expire immediately.  So when a program next asks
  for the size, or reads past the requested size, the kernel requests the attributes and gets
  the real size.  `SizeFixup` causes such a request right after the reply, in case no program
  does.
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
        """Handle changes of size for one mount.

        Args:
            options: The options of the mount.
            try_drop_pages: Makes the kernel drop all its cached pages of a disk; returns False if
                some may be left (`Laundering.try_drop_pages`).
        """
        self._options = options
        self._try_drop_pages = try_drop_pages
        self._explained: set[int] = set()

    async def set_size(self, exported: ExportedDisk, size: int) -> bool:
        """Carry out a SETATTR request for ``size`` bytes.

        A partition can be zeroed like a disk, and never becomes larger.

        Returns:
            True if the reply to the kernel must give the real size of the disk.  False if the
            reply must give ``size``, in attributes that expire immediately.

        Raises:
            FUSEError: EPERM, the options do not allow this size, the request would enlarge a
                partition, or `SizeFixup` has caused the request and the disk has grown since;
                EFBIG, as in `grow`.
            QedError: The disk could not be changed; part of the range may be zeroed.
        """
        disk = exported.disk
        if size == disk.size:
            return True
        if size == exported.fixup_size and size < disk.size:
            # `SizeFixup` has caused this request, and the disk has grown since `SizeFixup` read
            # the size of the disk.  The request is refused, because it would zero data although
            # no user has truncated the disk.
            raise FUSEError(errno.EPERM)
        if size == 0 or (size < disk.size and self._options.truncate == "zero"):
            return await self._zero_from(exported, size)
        if size < disk.size or not self._options.growable or exported.is_partition:
            raise FUSEError(errno.EPERM)
        await self.grow(exported, size)
        return True

    async def grow(self, exported: ExportedDisk, end: int) -> None:
        """Grow a disk to ``end`` bytes, rounded up to whole sectors.

        Does nothing if the disk is that large already.  For example, another request may have grown
        the disk while the caller waited.

        Raises:
            FUSEError: ENOSPC, the options do not let disks grow, or the file is a partition; EFBIG,
                the tables cannot address the size.
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
        """Zero a disk from guest offset ``start`` to its end; keep its size.

        Returns:
            True if the kernel has dropped all its pages, and the reply must give the real size.
            False if the kernel may have pages left, and the reply must give ``start`` as the size
            (see `set_size`).

        Raises:
            FUSEError: EPERM, the option ``truncate`` refuses truncations; the refusal is logged
                once for each disk.
            QedError: The disk could not be changed; part of the range may be zeroed.
        """
        if self._options.truncate == "refuse":
            self._explain(exported)
            raise FUSEError(errno.EPERM)
        try:
            await exported.disk.discard(start, exported.disk.size - start)
        finally:
            # The pages are dropped after a failure as well, because a part of the range may be
            # zeroed, and programs must see the content that the disk has now.  If the kernel
            # cannot drop the pages before the reply, the notification of `Laundering` goes on in
            # the helper process.  After a reply with an error the kernel then writes the dirty
            # pages back, and drops all pages.
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
