"""truncate(2) and open(2) with O_TRUNC: what they mean for a disk, whose size is fixed.

The kernel does not send O_TRUNC with the open request (see `qedfuse.mount.fuse.fuseinit`): a
SETATTR request with the size 0 follows, as for truncate(2).  By default it is refused.  A
program that was told that the file is empty leaves out the zeros that it copies, and old
bytes would stay in their place.  With ``truncate=zero`` the disk is emptied, as by a discard
of all of it, and keeps its size.  A truncation to a size between 0 and that of the disk
empties what lies past it: cp(1) makes one for a source that ends in a hole, and all that was
cut off reads as zeros, as in a file that is truncated and made longer again.

The pages in the kernel's cache have to go as well.  While the kernel waits for the answer to
SETATTR, it holds the lock of the inode and sends no dirty page (FUSE_NOWRITE in fs/fuse).
So with ``truncate=zero`` the write-back cache is off: then only a shared memory map makes
pages dirty.

- Without dirty pages the kernel drops all pages before the answer, when it is asked to, and
  the answer gives the size that the disk still has.
- With a dirty page the kernel cannot do that before the answer: it would have to write the
  page back first.  Then the answer gives the size that was asked for, and the kernel drops
  all pages past it by itself, the dirty ones without writing them back.  The attributes
  expire at once, so the next request for the size or for data past it gets the real size,
  and `SizeFixup` asks for it at once in case nobody else does.
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
    """Changes the size of a disk, or refuses to."""

    def __init__(
        self, options: MountOptions, forget_pages: Callable[[ExportedDisk], Awaitable[bool]]
    ) -> None:
        """Follow the options ``growable`` and ``truncate``.

        Args:
            options: The mount's.
            forget_pages: Has the kernel drop the pages that it caches of a disk, and returns
                False if it could not within a short time.
        """
        self._options = options
        self._forget_pages = forget_pages
        self._explained: set[int] = set()

    async def set_size(self, view: ExportedDisk, size: int) -> bool:
        """Carry out a SETATTR request for ``size`` bytes.

        Returns:
            Whether the answer to the kernel has to give the real size.  If not, it has to
            give ``size``, which expires at once.

        Raises:
            FUSEError: EPERM, the options do not allow it; EFBIG, the tables cannot address
                that much.
            QedError: The disk could not be changed; a part of it may be empty.
        """
        disk = view.disk
        if size == disk.size:
            return True
        if size == view.correcting and size < disk.size:
            # The disk has grown since `SizeFixup` looked: nobody wants anything cut off.
            raise FUSEError(errno.EPERM)
        if size == 0 or (size < disk.size and self._options.truncate == "zero"):
            return await self._empty_from(view, size)
        if size < disk.size or not self._options.growable:
            raise FUSEError(errno.EPERM)
        if size > disk.header.geometry.max_image_size:
            raise FUSEError(errno.EFBIG)
        await disk.resize(size)
        return True

    async def _empty_from(self, view: ExportedDisk, start: int) -> bool:
        """Make a disk read as zeros from an offset on; see `set_size`."""
        if self._options.truncate == "refuse":
            self._explain(view)
            raise FUSEError(errno.EPERM)
        try:
            await view.disk.discard(start, view.disk.size - start)
        finally:
            # Also after a failure: what the disk holds now is what programs have to see, if
            # not before the answer, then as soon as dirty pages have been written back.
            forgotten = await self._forget_pages(view)
        return forgotten

    def _explain(self, view: ExportedDisk) -> None:
        """Log what to do instead, once for each disk."""
        if view.inode not in self._explained:
            self._explained.add(view.inode)
            _log.warning(
                "%s: an open with O_TRUNC, or a truncation to 0, was refused and nothing is "
                "changed: a disk keeps its size; write with conv=notrunc or qedimg convert -n, "
                "or mount with -o truncate=zero to have the disk emptied",
                view.disk.name,
            )
