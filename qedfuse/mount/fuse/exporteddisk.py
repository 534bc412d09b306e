"""What the mount shows of a disk: one file, its attributes, and who may see it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pyfuse3

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.mount.options import MountOptions

_ATTR_SECONDS: Final = 86400.0
"""How long the kernel believes what it knows of a file.  All changes come through it but
that of the space a file takes up, of which it is told.  Where this is short, each write
that finds it expired asks for the attributes first, and many at once do so for ever,
because an answer that a write has overtaken does not count."""
_SHARED_ATTR_SECONDS: Final = 1.0
"""The same where another program writes to the image."""
_ENTRY_SECONDS: Final = 300.0
"""The same for names, which never change."""


@dataclass(eq=False, slots=True)
class ExportedDisk:
    """One file of the mount.

    Attributes:
        disk: What is in it.
        name: What it is called in the root directory.
        inode: Its number.
        opened: How many handles are open.
        writers: How many of them may write.
        writing: How many writes are under way.
        blocks: What the image takes up on the host as far as the kernel knows; -1 if it is
            going to ask.
        read_only: Whether the disk is read-only beside others that can be written to.
        overrun: A write that the kernel had cached went past the end; nobody knows yet.
        correcting: The size to which `SizeFixup` truncates the disk; -1 if it does not.
    """

    disk: Disk
    name: bytes
    inode: int
    read_only: bool = False
    opened: int = 0
    writers: int = 0
    writing: int = 0
    blocks: int = -1
    overrun: bool = False
    correcting: int = -1


class Attributes:
    """Who owns what in the mount, and with which permissions."""

    def __init__(self, options: MountOptions) -> None:
        """Take the owner and the permissions from the options, or else from the caller."""
        self.uid = os.getuid() if options.uid is None else options.uid
        self._seconds = _SHARED_ATTR_SECONDS if options.force_share else _ATTR_SECONDS
        self.gid = os.getgid() if options.gid is None else options.gid
        # Only the owner, unless the user says otherwise: a disk holds everybody's files.
        mask = 0o077 if options.umask is None else options.umask
        writing = 0 if options.read_only else 0o222
        self.file_mode = stat.S_IFREG | ((0o444 | writing) & ~mask)
        # Nothing can be made or removed in the directory, so nobody needs to write to it.
        self.directory_mode = stat.S_IFDIR | (0o555 & ~mask)

    def of_disk(self, view: ExportedDisk) -> pyfuse3.EntryAttributes:
        """Describe a disk: its own size; space and times of the image file."""
        image = view.disk.fstat()
        mode = self.file_mode & ~0o222 if view.read_only else self.file_mode
        entry = self._entry(view.inode, mode, image)
        entry.st_size = view.disk.size
        view.blocks = entry.st_blocks = image.st_blocks
        entry.st_nlink = 1
        return entry

    def of_root(self, views: list[ExportedDisk]) -> pyfuse3.EntryAttributes:
        """Describe the directory; it is as old as its newest image."""
        newest = max((view.disk.fstat() for view in views), key=lambda image: image.st_mtime_ns)
        entry = self._entry(pyfuse3.ROOT_INODE, self.directory_mode, newest)
        entry.st_nlink = 2
        return entry

    def _entry(self, inode: int, mode: int, image: os.stat_result) -> pyfuse3.EntryAttributes:
        """Fill in what directory and disk have in common."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = mode
        entry.st_uid = self.uid
        entry.st_gid = self.gid
        entry.st_blksize = 4096
        entry.st_atime_ns = image.st_atime_ns
        entry.st_mtime_ns = image.st_mtime_ns
        entry.st_ctime_ns = image.st_ctime_ns
        entry.attr_timeout = self._seconds
        entry.entry_timeout = _ENTRY_SECONDS
        return entry
