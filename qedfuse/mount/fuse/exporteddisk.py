"""The disks that a mount exports as files, and the handles that are open on them.

A file has the bytes of a disk or of a partition.  The kernel caches the pages of each file
separately.  So files with bytes in common exclude each other: while one of them is open for
writing, the others cannot be open (docs/concurrency.md).
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.window import DiskWindow
from qedfuse.errors import QedError
from qedfuse.mount.fuse.requestcounters import RequestCounters, SharedCells
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from qedfuse.disk.disk import Disk

_BLOCK_BYTES: Final = 512
"""The unit of ``st_blocks`` in bytes."""


class FileInUseError(QedError):
    """A file cannot be opened now, because another file with bytes in common is open."""

    errno = errno.EBUSY


@dataclass(eq=False, slots=True)
class ExportedDisk:
    """One file of the mount.

    Attributes:
        disk: The content of the file: a disk, or one of its partitions.
        name: The name of the file in the root directory; of no effect if the mountpoint is a file.
        inode: The inode number of the file.
        handles: The number of open handles.
        writers: The number of open handles that may write, plus the uses of `changing` in progress.
        slow_writes: The number of write requests in progress that may wait (`Operations.write`).
        cached_blocks: The ``st_blocks`` that the kernel may have cached; -1 for none.
        read_only: Whether the disk is read-only in a writable mount: a base of another disk.
        overrun: Whether a write from the kernel's cache went past the end of the disk, and no
            writer has got the error ENOSPC since.
        has_lost_data: Whether a write from the kernel's cache has failed because bytes that a
            server or QEMU serves could not be read.
        fixup_size: The size in bytes that `SizeFixup` is making the kernel cache; -1 for none.
        counters: Counts the requests to the file; a partition shares this object with its disk.
        stale_marks: How often `mark_stale` was called.
        dropped_marks: The value that ``stale_marks`` had when the kernel was last made to drop its
            pages of the file.
    """

    disk: Disk | DiskWindow
    name: bytes
    inode: int
    read_only: bool = False
    handles: int = 0
    writers: int = 0
    slow_writes: int = 0
    cached_blocks: int = -1
    overrun: bool = False
    has_lost_data: bool = False
    fixup_size: int = -1
    counters: RequestCounters = field(default_factory=RequestCounters)
    stale_marks: int = 0
    dropped_marks: int = 0

    @property
    def is_stale(self) -> bool:
        """Whether pages that the kernel has cached of the file may differ from the disk."""
        return self.stale_marks > self.dropped_marks

    def mark_stale(self) -> None:
        """Record that pages that the kernel has cached of the file may differ from the disk."""
        # The marks are counted, because a write can fail while the kernel drops pages for an
        # earlier mark.  Then the page of this write may stay.
        self.stale_marks += 1

    @property
    def is_partition(self) -> bool:
        """Whether the file has the bytes of a partition."""
        return isinstance(self.disk, DiskWindow)

    @property
    def whole_disk(self) -> Disk:
        """The whole disk."""
        return self.disk.disk if isinstance(self.disk, DiskWindow) else self.disk

    def visible_blocks(self, image_blocks: int) -> int:
        """Return the ``st_blocks`` of the file; ``image_blocks`` are those of the image file.

        Counting the clusters of a partition would mean reading all tables for its range.  So a
        partition gets a share of the disk's blocks that is proportional to its size.  The share is
        rounded up, because programs treat a file without blocks as one hole.
        """
        if not self.is_partition:
            return image_blocks
        share = -(-image_blocks * self.disk.size // self.whole_disk.size)
        return min(share, self.disk.size // _BLOCK_BYTES)

    def shares_bytes(self, other: ExportedDisk) -> bool:
        """Return whether ``other`` is another file that has bytes in common with this file."""
        if self is other or self.whole_disk is not other.whole_disk:
            return False
        mine, its = self.disk, other.disk
        if not isinstance(mine, DiskWindow) or not isinstance(its, DiskWindow):
            return True
        return mine.start < its.start + its.size and its.start < mine.start + mine.size


class ExportedDisks:
    """All files of a mount, iterated in the order in which they were added.

    Attributes:
        by_inode: The files by inode number.
        by_name: The files by file name.
        outdated: The disks whose partition files must be updated; empty in a mount without files
            of partitions.
    """

    def __init__(self, disks: Iterable[ExportedDisk], *, with_partitions: bool = False) -> None:
        """Export ``disks``, to which the caller may add the partitions (`set_partitions`)."""
        self.by_inode = {exported.inode: exported for exported in disks}
        self.by_name = {exported.name: exported for exported in self.by_inode.values()}
        # The files of each disk, by the identity of the disk.
        self._by_disk: dict[int, list[ExportedDisk]] = {}
        for exported in self.by_inode.values():
            self._by_disk.setdefault(id(exported.whole_disk), []).append(exported)
        self.outdated = set(self.by_inode.values()) if with_partitions else set[ExportedDisk]()
        self._with_partitions = with_partitions
        self._next_inode = max(self.by_inode, default=0) + 1
        self._cells = [exported.counters.cells for exported in self.by_inode.values()]
        self._all_closed = trio.Event()

    def __iter__(self) -> Iterator[ExportedDisk]:
        """Iterate over the present files; files that are added meanwhile are left out."""
        return iter(tuple(self.by_inode.values()))

    @property
    def whole_disks(self) -> list[Disk]:
        """The disks of the mount, each once."""
        return [exported.whole_disk for exported in self.first_files]

    @property
    def first_files(self) -> list[ExportedDisk]:
        """The first file of each disk of the mount: that of the whole disk, if it has one."""
        return [files[0] for files in self._by_disk.values()]

    def files_of(self, disk: Disk) -> Sequence[ExportedDisk]:
        """Return the files that have bytes of a disk, in the order in which they were added."""
        return self._by_disk[id(disk)]

    def was_removed(self, inode: int) -> bool:
        """Return whether the file ``inode`` was removed; ``inode`` must not be the directory's."""
        return 0 < inode < self._next_inode and inode not in self.by_inode

    def set_partitions(self, whole: ExportedDisk, windows: dict[bytes, DiskWindow]) -> bool:
        """Replace the files of a disk's partitions; return whether any was added or removed.

        A file stays if a partition has its name, its start and its size.  A new file gets a new
        inode number, because the kernel may have cached pages of an earlier file with the same
        name.  No partition of the disk may be open.
        """
        files = self._by_disk[id(whole.whole_disk)]
        present = {item.name: item for item in files if item.is_partition}
        is_changed = False
        for name, exported in present.items():
            window, old = windows.get(name), exported.disk
            if (
                window is None
                or not isinstance(old, DiskWindow)
                or (window.start, window.size) != (old.start, old.size)
            ):
                del self.by_inode[exported.inode], self.by_name[name]
                files.remove(exported)
                # The end of the mount still reports the loss.
                whole.has_lost_data |= exported.has_lost_data
                is_changed = True
        for name, window in windows.items():
            if name not in self.by_name:
                exported = ExportedDisk(
                    *(window, name, self._next_inode),
                    read_only=whole.read_only,
                    counters=whole.counters,
                )
                self._next_inode += 1
                self._cells.append(exported.counters.cells)
                self.by_inode[exported.inode] = self.by_name[name] = exported
                files.append(exported)
                is_changed = True
        return is_changed

    def shared_cells(self) -> SharedCells:
        """Return the arrays in which the C extension counts requests, even of removed files."""
        return SharedCells(self._next_inode - len(self._cells), tuple(self._cells))

    @property
    def open_handles(self) -> int:
        """The number of open handles of all disks."""
        return sum(exported.handles for exported in self)

    @property
    def uses_servers(self) -> bool:
        """Whether a server or qemu-nbd serves a file of any disk's chain."""
        return any(disk.uses_server for disk in self.whole_disks)

    @property
    def with_lost_data(self) -> list[str]:
        """The names of the disks for which `ExportedDisk.has_lost_data` is set."""
        return [exported.disk.name for exported in self if exported.has_lost_data]

    def handle_opened(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Count a new handle of a file; ``writer`` says whether the handle may write.

        Raises:
            FileInUseError: Another file with bytes in common is open, and it or the new handle may
                write.
        """
        self._exclude_others(exported, writer=writer)
        exported.handles += 1
        exported.writers += writer

    def _exclude_others(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Raise `FileInUseError` if open files with bytes in common forbid a handle or a change.

        Otherwise, if ``writer`` is True, mark the files with bytes in common as stale.
        """
        others = self._sharing_bytes(exported)
        for other in others:
            if other.writers or (writer and other.handles):
                action = "opened for writing" if writer else "opened"
                state = "is open for writing" if other.writers else "is open"
                msg = (
                    f"{printable(exported.name)}: cannot be {action}: {printable(other.name)}, "
                    f"which has the same bytes, {state}"
                )
                raise FileInUseError(msg)
        if writer:
            for other in others:
                other.mark_stale()

    def write_failed(self, exported: ExportedDisk) -> None:
        """Mark a file as stale after a failed write, if another file has bytes in common with it.

        The kernel may keep a page with bytes that the disk, and so the other file, does not have.
        """
        if self._sharing_bytes(exported):
            exported.mark_stale()

    def _sharing_bytes(self, exported: ExportedDisk) -> list[ExportedDisk]:
        """Return the other files that have bytes in common with a file."""
        files = self.files_of(exported.whole_disk)
        return [other for other in files if other.shares_bytes(exported)]

    @contextmanager
    def changing(self, exported: ExportedDisk) -> Iterator[None]:
        """Exclude the other files with bytes in common while the ``with`` block changes a file.

        Raises:
            FileInUseError: Another file with bytes in common is open.
        """
        self._exclude_others(exported, writer=True)
        exported.writers += 1
        try:
            yield
        finally:
            self._writer_ended(exported)

    def _writer_ended(self, exported: ExportedDisk) -> None:
        """Count a writer as ended; the last one of a whole disk makes its partitions outdated."""
        exported.writers -= 1
        if not exported.writers and self._with_partitions and not exported.is_partition:
            self.outdated.add(exported)

    def handle_closed(self, exported: ExportedDisk, *, writer: bool) -> None:
        """Count a handle as closed; the last one of all disks sets the event of `all_closed_event`.

        Args:
            exported: The file of the handle.
            writer: Whether the handle may write.
        """
        exported.handles -= 1
        if writer:
            self._writer_ended(exported)
        if not self.open_handles:
            self._all_closed.set()
            self._all_closed = trio.Event()

    def all_closed_event(self) -> trio.Event:
        """Return an event that is set the next time that the last open handle is closed."""
        return self._all_closed

    def stop_fetching(self) -> None:
        """Fail all present and later reads of the disks that would wait for a server.

        Call this only when no program needs the data of such a read any more.
        """
        for disk in self.whole_disks:
            disk.stop_fetching()

    def stop_compacting(self) -> None:
        """End the present and later compactions of all disks; moved clusters stay moved."""
        for disk in self.whole_disks:
            disk.stop_compacting()
