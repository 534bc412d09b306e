"""Attributes of the files of a mount: owner, permissions, sizes and times."""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING, Final

import pyfuse3

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)

_ATTR_TIMEOUT_SECONDS: Final = 86400.0
"""How long the kernel may cache attributes.  All changes come from the kernel, except that of
``st_blocks``, for which the cache is invalidated.  With a short timeout, each write that finds
the attributes expired requests them first.  Many concurrent writes then do so without end,
because the kernel ignores a reply that a write has overtaken."""
_SHARED_ATTR_TIMEOUT_SECONDS: Final = 1.0
"""The same while another program may write to the image."""
_ENTRY_TIMEOUT_SECONDS: Final = 300.0
"""How long the kernel may cache names, which never change."""
_BLOCK_BYTES: Final = 4096
"""The block size that programs are advised to use (``st_blksize``)."""
_TIMES_TOLERANCE_NS: Final = 1_000_000_000
"""Difference between the times of a disk and of its image up to which the image's are kept."""


class Attributes:
    """Builds the attributes of disks and of the directory."""

    def __init__(self, options: MountOptions) -> None:
        """Take owner and permissions from the options; the default owner is the caller."""
        self._uid = os.getuid() if options.uid is None else options.uid
        self._gid = os.getgid() if options.gid is None else options.gid
        self._timeout = (
            _SHARED_ATTR_TIMEOUT_SECONDS if options.force_share else _ATTR_TIMEOUT_SECONDS
        )
        # By default only the owner has access: a disk holds the files of many users.
        mask = 0o077 if options.umask is None else options.umask
        write_bits = 0 if options.read_only else 0o222
        self._file_mode = stat.S_IFREG | ((0o444 | write_bits) & ~mask)
        # No file can be made or removed in the directory, so it is not writable.
        self._directory_mode = stat.S_IFDIR | (0o555 & ~mask)

    def of_disk(self, exported: ExportedDisk) -> pyfuse3.EntryAttributes:
        """Return the attributes of a disk: its size, and space and times of the image file."""
        image = exported.disk.fstat()
        mode = self._file_mode & ~0o222 if exported.read_only else self._file_mode
        entry = self._common(exported.inode, mode, image)
        entry.st_size = exported.disk.size
        exported.blocks = entry.st_blocks = image.st_blocks
        entry.st_nlink = 1
        return entry

    def of_root(self, disks: Iterable[ExportedDisk]) -> pyfuse3.EntryAttributes:
        """Return the attributes of the directory; its times are those of the newest image."""
        images = (exported.disk.fstat() for exported in disks)
        newest = max(images, key=lambda image: image.st_mtime_ns)
        entry = self._common(pyfuse3.ROOT_INODE, self._directory_mode, newest)
        entry.st_nlink = 2
        return entry

    def _common(self, inode: int, mode: int, image: os.stat_result) -> pyfuse3.EntryAttributes:
        """Return the attributes that a directory and a disk have in common."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = mode
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_blksize = _BLOCK_BYTES
        entry.st_atime_ns = image.st_atime_ns
        entry.st_mtime_ns = image.st_mtime_ns
        entry.st_ctime_ns = image.st_ctime_ns
        entry.attr_timeout = self._timeout
        entry.entry_timeout = _ENTRY_TIMEOUT_SECONDS
        return entry


async def set_times(exported: ExportedDisk, atime_ns: int, mtime_ns: int) -> None:
    """Set the times of the image file, as utimensat(2) or the kernel's cache did for the disk.

    A failure is logged and not raised.
    """
    if not exported.disk.writable:
        return
    try:
        image = exported.disk.fstat()
        difference = max(abs(image.st_atime_ns - atime_ns), abs(image.st_mtime_ns - mtime_ns))
        if difference < _TIMES_TOLERANCE_NS:
            # Before each fsync the kernel sends the time of the last write, and the host's
            # file system has set about the same time by itself.
            return
        await exported.disk.set_times(atime_ns, mtime_ns)
    except OSError as error:
        # The file may be another user's.  Nothing depends on its times.
        _log.debug("%s: cannot set times: %s", exported.disk.name, error)
