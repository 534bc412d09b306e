"""The disks that a mount exports, each as one file, and the handles that are open on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from qedfuse.mount.fuse.requestcounters import RequestCounters, SharedCells

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qedfuse.disk.disk import Disk


@dataclass(eq=False, slots=True)
class ExportedDisk:
    """One file of the mount.

    Attributes:
        disk: The content of the file.
        name: The name of the file in the root directory; of no effect if the mountpoint is a file.
        inode: The inode number of the file.
        handles: The number of open handles.
        writers: The number of open handles that may write.
        slow_writes: The number of write requests in progress on the slow path.
        blocks: The ``st_blocks`` (in units of 512 bytes) that the kernel may have cached; -1
            if the kernel has none cached.
        read_only: Whether this disk is read-only in a writable mount, because its image is a
            backing file of another disk of the mount.  False in a read-only mount.
        overrun: Whether a write from the kernel's cache began before the end of the disk and went
            past it, and no writer has got the error yet.
        has_lost_data: Whether a write from the kernel's cache has failed because a server did not
            give the rest of a cluster.
        fixup_size: The size in bytes to which `SizeFixup` is setting the kernel's cached size of
            the file; -1 while `SizeFixup` does not work on the file.
        requests: Counts the requests to the file.
    """

    disk: Disk
    name: bytes
    inode: int
    read_only: bool = False
    handles: int = 0
    writers: int = 0
    slow_writes: int = 0
    blocks: int = -1
    overrun: bool = False
    has_lost_data: bool = False
    fixup_size: int = -1
    requests: RequestCounters = field(default_factory=RequestCounters)


class ExportedDisks:
    """All disks of a mount, iterated in the order in which the user named them.

    Attributes:
        by_inode: The disks by inode number.
        by_name: The disks by file name.
    """

    def __init__(self, disks: Iterable[ExportedDisk]) -> None:
        """Export ``disks``; no disk has an open handle yet."""
        self.by_inode = {exported.inode: exported for exported in disks}
        self.by_name = {exported.name: exported for exported in self.by_inode.values()}
        self._all_closed = trio.Event()

    def __iter__(self) -> Iterator[ExportedDisk]:
        """Iterate over the disks in the order in which the user named them."""
        return iter(self.by_inode.values())

    def shared_cells(self) -> SharedCells:
        """Return the arrays in which the extension counts requests to the disks."""
        cells = tuple(exported.requests.cells for exported in self)
        return SharedCells(min(self.by_inode, default=0), cells)

    @property
    def open_handles(self) -> int:
        """The number of open handles of all disks."""
        return sum(exported.handles for exported in self)

    @property
    def use_servers(self) -> bool:
        """Whether a file of the chain of a disk is on a server."""
        return any(exported.disk.uses_server for exported in self)

    @property
    def with_lost_data(self) -> list[str]:
        """The names of the disks for which `ExportedDisk.has_lost_data` is set."""
        return [exported.disk.name for exported in self if exported.has_lost_data]

    def handle_opened(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Count a new handle of a disk; ``writer`` says whether the handle may write."""
        exported.handles += 1
        exported.writers += writer

    def handle_closed(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Count a handle as closed.

        If no handle of any disk is left, set the present event of `all_closed_event`.  Later
        calls of that method return a new event.

        Args:
            exported: The disk of the handle.
            writer: Whether the handle may write, as in `handle_opened`.
        """
        exported.handles -= 1
        exported.writers -= writer
        if not self.open_handles:
            self._all_closed.set()
            self._all_closed = trio.Event()

    def all_closed_event(self) -> trio.Event:
        """Return an event that is set the next time that the last open handle is closed.

        If no handle of any disk is open now, the event is set only after a handle has been opened
        and all handles have been closed again.
        """
        return self._all_closed

    def stop_fetching(self) -> None:
        """Make every read of a disk fail that waits for a server, now or later.

        The caller knows that no program waits for these reads any more.
        """
        for exported in self:
            exported.disk.stop_fetching()

    def stop_compacting(self) -> None:
        """End the compaction of all disks; clusters that have been moved stay moved.

        A compaction that begins later moves no cluster.
        """
        for exported in self:
            exported.disk.stop_compacting()
