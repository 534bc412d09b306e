"""The disks that a mount exports, each as one file, and the handles that are open on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qedfuse.disk.disk import Disk

HANDLE_DIRECT: Final = 1 << 62
"""Bit of a file handle: opened with O_DIRECT.

A file handle is the inode number of the disk together with the `HANDLE_FLAGS` that apply."""
HANDLE_WRITER: Final = 1 << 61
"""Bit of a file handle: opened with an access mode other than O_RDONLY."""
HANDLE_SYNC: Final = 1 << 60
"""Bit of a file handle: each write must be durable before the reply."""
HANDLE_FLAGS: Final = HANDLE_DIRECT | HANDLE_WRITER | HANDLE_SYNC


@dataclass(eq=False, slots=True)
class ExportedDisk:
    """One file of the mount.

    Attributes:
        disk: The content of the file.
        name: The name of the file in the root directory.
        inode: The inode number of the file.
        opened: The number of open handles.
        writers: The number of open handles that may write.
        writing: The number of write requests in progress on the slow path.
        blocks: The ``st_blocks`` (in units of 512 bytes) that the kernel may have cached; -1
            if the kernel has none cached.
        read_only: Whether the disk is read-only although the mount is writable.
        overrun: Whether a write from the kernel's cache went past the end of the disk, and the
            error has not been reported to a writer yet.
        fixup_size: The size in bytes to which `SizeFixup` is truncating the file; -1 while
            `SizeFixup` does not work on the file.
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
    fixup_size: int = -1


class ExportedDisks:
    """All disks of a mount, iterated in the order in which the user named them.

    Attributes:
        by_inode: The disks by inode number.
        by_name: The disks by file name.
    """

    def __init__(self, disks: Iterable[ExportedDisk]) -> None:
        """Export ``disks``, of which no handle is open yet."""
        self.by_inode = {exported.inode: exported for exported in disks}
        self.by_name = {exported.name: exported for exported in self.by_inode.values()}
        self._last_close = trio.Event()

    def __iter__(self) -> Iterator[ExportedDisk]:
        """Iterate over the disks."""
        return iter(self.by_inode.values())

    @property
    def open_handles(self) -> int:
        """The number of open handles of all disks."""
        return sum(exported.opened for exported in self)

    def handle_opened(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Count a new handle; ``writer`` if it may write."""
        exported.opened += 1
        exported.writers += writer

    def handle_closed(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Stop counting a handle; if no disk has one left, set the event of `next_last_close`."""
        exported.opened -= 1
        exported.writers -= writer
        if not self.open_handles:
            self._last_close.set()
            self._last_close = trio.Event()

    def next_last_close(self) -> trio.Event:
        """Return an event that is set when the last open handle of all disks is closed.

        The event is not set because no handle is open now.
        """
        return self._last_close

    def stop_compacting(self) -> None:
        """End the compaction of all disks; clusters that were moved already stay moved."""
        for exported in self:
            exported.disk.stop_compacting()
