"""Attributes of the files of a mount: owner, permissions, sizes and times."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pyfuse3

from qedfuse.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk
    from qedfuse.mount.options import MountOptions

_log = logging.getLogger(__name__)

_ATTR_TIMEOUT_SECONDS: Final = 86400.0
"""How long the kernel may cache attributes.

A long time is safe, because only ``st_blocks`` and the times change without a request of the
kernel.  After a change of ``st_blocks``, the server invalidates the cached attributes.  The times
of the image file change when tables are written; the content of the disk does not change then, so
the kernel may keep the older times.

A short time would slow down writes.  Before a write, the kernel requests attributes that have
expired, and it ignores the reply if another write has ended in the meantime.  So with many
concurrent writes the kernel would request the attributes again and again.
"""
_SHARED_ATTR_TIMEOUT_SECONDS: Final = 1.0
"""How long the kernel may cache attributes with ``force_share``, which permits that another program
changes the image."""
_ENTRY_TIMEOUT_SECONDS: Final = 300.0
"""How long the kernel may cache which disk a name stands for.  Any time is safe, because names of
disks never change; those of partitions do, and are not cached."""
_BLOCK_BYTES: Final = 4096
"""The block size that programs are advised to use (``st_blksize``)."""
_TIMES_TOLERANCE_NS: Final = 1_000_000_000
"""If both times differ by less than this from those of the image file, `set_times` does nothing."""
_UNKNOWN_STATUS: Final = os.stat_result(
    (0,) * 10, {"st_atime_ns": 0, "st_mtime_ns": 0, "st_ctime_ns": 0, "st_blocks": 0}
)
"""Stands for the status of an image file that the host has refused since the beginning."""


def _mask(options: MountOptions) -> int:
    """Return the permission bits that the files and the directory must not have.

    By default only the owner has access, because a disk may contain files of many users.
    """
    return 0o077 if options.umask is None else options.umask


def file_mode(options: MountOptions) -> int:
    """Return the permissions of a disk, which in a read-only mount do not include writing."""
    write_bits = 0 if options.read_only else 0o222
    return (0o444 | write_bits) & ~_mask(options)


class Attributes:
    """Builds the attributes of disks and of the directory, for the replies to the kernel.

    The host may refuse the attributes of one image file, for example because its server has ended
    (ENOTCONN) or the file was removed there (ESTALE).  Then the requests to that disk fail, but the
    directory and its listing have the last known attributes, so that the other disks are found.
    """

    def __init__(self, options: MountOptions) -> None:
        """Take owner and permissions from the options."""
        # The last known status of the image file of each disk, by the identity of the disk.
        self._last_status: dict[int, os.stat_result] = {}
        self._uid = os.getuid() if options.uid is None else options.uid
        self._gid = os.getgid() if options.gid is None else options.gid
        self._timeout = (
            _SHARED_ATTR_TIMEOUT_SECONDS if options.force_share else _ATTR_TIMEOUT_SECONDS
        )
        mask = _mask(options)
        self._file_mode = stat.S_IFREG | file_mode(options)
        # No file can be made or removed in the directory, so the directory is not writable.
        self._directory_mode = stat.S_IFDIR | (0o555 & ~mask)

    def for_reply(self, exported: ExportedDisk) -> pyfuse3.EntryAttributes:
        """Return the attributes of a disk for a reply; record their ``st_blocks`` as cached.

        The caller must send the attributes next, and must not wait or raise an error before that.
        Otherwise the kernel would keep an older ``st_blocks``, and the server would not notice.
        """
        attributes = self.of_disk(exported)
        exported.cached_blocks = attributes.st_blocks
        return attributes

    def of_disk(self, exported: ExportedDisk) -> pyfuse3.EntryAttributes:
        """Return the attributes of a disk; the times are those of the image file.

        ``st_blocks`` is that of the image file too, or a partition's share of it.
        A caller that sends the attributes to the kernel must use `for_reply`, or must set
        ``exported.cached_blocks`` itself.

        Raises:
            HostError: The host refuses the attributes of the image file.
        """
        return self._of_file(exported, self._read_status(exported))

    def for_listing(self, exported: ExportedDisk) -> pyfuse3.EntryAttributes:
        """Return the attributes of a disk for a listing of the directory; see `of_disk`.

        If the host refuses those of the image file, they are the last known ones, and the kernel is
        asked not to cache them, so that it gets the error when a program uses the name.
        """
        try:
            return self.of_disk(exported)
        except HostError:
            entry = self._of_file(exported, self._known_status(exported))
            entry.attr_timeout = entry.entry_timeout = 0
            return entry

    def _read_status(self, exported: ExportedDisk) -> os.stat_result:
        """Return the status of the image file of a disk; raise HostError if the host refuses it."""
        status = exported.disk.fstat()
        self._last_status[id(exported.whole_disk)] = status
        return status

    def _known_status(self, exported: ExportedDisk) -> os.stat_result:
        """Return the last known status of the image file of a disk."""
        return self._last_status.get(id(exported.whole_disk), _UNKNOWN_STATUS)

    def _of_file(self, exported: ExportedDisk, status: os.stat_result) -> pyfuse3.EntryAttributes:
        """Return the attributes of a disk whose image file has the status ``status``."""
        mode = self._file_mode & ~0o222 if exported.read_only else self._file_mode
        entry = self._common(exported.inode, mode, status)
        entry.st_size = exported.disk.size
        entry.st_blocks = exported.visible_blocks(status.st_blocks)
        entry.st_nlink = 1
        if exported.is_partition:
            # After a change of the partition table the name may stand for another file, or none.
            entry.entry_timeout = 0
        return entry

    def of_root(self, disks: Iterable[ExportedDisk]) -> pyfuse3.EntryAttributes:
        """Return the attributes of the directory, with the times of the newest image file."""
        statuses = []
        for exported in disks:
            with suppress(HostError):
                self._read_status(exported)
            statuses.append(self._known_status(exported))
        newest = max(statuses, key=lambda status: status.st_mtime_ns)
        entry = self._common(pyfuse3.ROOT_INODE, self._directory_mode, newest)
        entry.st_nlink = 2
        return entry

    def _common(self, inode: int, mode: int, status: os.stat_result) -> pyfuse3.EntryAttributes:
        """Return attributes without the size, the blocks and the number of links.

        ``status`` is that of the image file whose times are shown.
        """
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = mode
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_blksize = _BLOCK_BYTES
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        entry.attr_timeout = self._timeout
        entry.entry_timeout = _ENTRY_TIMEOUT_SECONDS
        return entry


async def set_times(exported: ExportedDisk, atime_ns: int, mtime_ns: int) -> None:
    """Set the times of the image file to the times that the kernel has for the disk.

    Nothing is done if the image is open read-only, or if both times differ by less than a second.
    A failure is only logged.

    Args:
        exported: The disk.
        atime_ns: Time of the last access, in nanoseconds since 1970.
        mtime_ns: Time of the last change, in nanoseconds since 1970.
    """
    if not exported.disk.writable:
        return
    try:
        status = exported.disk.fstat()
        difference = max(abs(status.st_atime_ns - atime_ns), abs(status.st_mtime_ns - mtime_ns))
        if difference < _TIMES_TOLERANCE_NS:
            # Before an fsync the kernel sends the time at which the disk was last written to.  This
            # write has given the image file about the same time.
            return
        await exported.disk.set_times(atime_ns, mtime_ns)
    except (OSError, HostError) as error:
        # For example, the image file belongs to another user.  No data depends on the times.
        _log.debug("%s: cannot set times: %s", exported.disk.name, error)
