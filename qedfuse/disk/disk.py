"""The disk: an opened image, with its chain, as an array of bytes that can be changed.

`qedfuse.disk.opening.open_disk` opens a disk:

    async with open_disk("vm.qed", OpenOptions(writable=True)) as disk:
        await disk.write(0, b"...")
        await disk.flush()
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qedfuse.disk.components import Components
from qedfuse.disk.guestchanges import GuestChanges
from qedfuse.disk.lifecycle import Lifecycle
from qedfuse.disk.lookup.rememberedbase import replace_versions
from qedfuse.disk.state.backingname import change_backing_name, new_name_offset
from qedfuse.disk.statistics import DiskStatistics, collect_statistics

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from qedfuse.disk.lookup.baseversion import BaseVersions
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.disk.options import OpenOptions
    from qedfuse.errors import QedError
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header
    from qedfuse.util.backgroundtasks import Progress


class Disk(GuestChanges):
    """One opened image: what a guest can request, and what only the owner of the image can do.

    Tasks may call all methods concurrently, except where a docstring demands that no other request
    is running.  On a disk that is or became read-only, methods that modify the image raise
    `ReadOnlyError`.  But `try_write` returns False, and `autocompact` raises no error.

    Attributes:
        path: The path of the image as the user gave it; empty if unknown.
        name: The name of the image file, escaped for messages.
    """

    def __init__(
        self,
        file: HostFile,
        header: Header,
        bases: list[Layer],
        options: OpenOptions,
        store: SliceStore,
        path: str = "",
    ) -> None:
        """Build a disk over open files.

        The caller must have locked the files if ``options`` demand locks, and checked the image in
        the cases in which `open_disk` checks it.  The caller must enter `serving` before it calls
        any other method.
        """
        components = Components(file, header, bases, options, store)
        super().__init__(components)
        self.path = path
        self._lifecycle = Lifecycle(components)
        self._header_store = components.header_store

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Start the disk; close the disk cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image is open for writing, and two of its L2 tables overlap, so
                a change of one would damage the other.
            UsageError: A free list is requested (`OpenOptions.free_list`), but other data lies
                where the list's descriptor must be.
            HostError: A system call failed, or something written could not be made durable.

        After any error the files are closed.
        """
        return self._lifecycle.serving()

    @property
    def header(self) -> Header:
        """The present header."""
        return self._header_store.value

    @property
    def scan_is_short(self) -> bool:
        """Whether the scan for free clusters takes only some milliseconds, and is not postponed.

        False if the disk is open read-only: then there is no scan.
        """
        scan = self._components.scan
        return self._file.writable and scan.is_short and not scan.is_postponed

    async def ensure_scanned(self) -> None:
        """Run the scan for free clusters, or wait for the end of the running scan.

        Returns even if the scan has failed.  The caller must have opened the disk for writing.
        """
        await self._components.scan.run()

    async def compact(self, progress: Progress | None = None, *, within_bound: bool = True) -> int:
        """Make the file as short as possible; return how many clusters were moved.

        The caller must ensure that no other request is running.  If the image cannot be compacted,
        a warning is logged, and nothing is moved.  If a corrupt table entry is found, an error is
        logged, and the compaction ends early.

        Args:
            progress: Called with the number of bytes that have been moved, and with the number
                that will probably be moved in all.
            within_bound: Whether the file must never become longer than its bound
                (`Geometry.bound`).  If so, free clusters may stay in the file.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: A system call failed; the image is sound.
        """
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        return await self._components.compaction.run(progress, within_bound=within_bound)

    @property
    def space_error(self) -> QedError | None:
        """Why free space could not be found or returned to the host; None if it could.

        Such errors are logged and not raised elsewhere, because the disk works without free space.
        Valid after the close as well.  `damaged` covers damage.
        """
        parts = self._components
        error = parts.scan.error or (parts.reclaim.error if parts.reclaim.pending else None)
        return error and error.again()

    @property
    def free_list_error(self) -> QedError | None:
        """Why the free list could not be stored; None if it could.  See `space_error`."""
        error = self._components.persistent_free_list.error
        return error and error.again()

    async def autocompact(self) -> None:
        """Compact the image now, as the close would do, if the options demand a compaction.

        The caller must ensure that no other request is running.  The file may become longer than
        its bound for a moment.  This method raises no error.  An error that has made the disk
        read-only is raised when the disk is closed, and any other is logged as a warning.
        """
        await self._lifecycle.autocompaction.run(within_bound=False)

    @property
    def uses_server(self) -> bool:
        """Whether the image or a base is on a server, or is served by qemu-nbd."""
        return any(layer.file.fileno() < 0 for layer in self._chain.layers)

    def stop_fetching(self) -> None:
        """Let no read wait for a server any more: such reads fail, the present ones too."""
        for layer in self._chain.layers:
            layer.file.stop_fetching()

    def stop_compacting(self) -> None:
        """End the running compaction, if any; later ones move nothing.  The image stays sound."""
        self._components.compaction.stop()

    async def grow(self, size: int, *, force: bool = False) -> None:
        """Grow the disk to ``size`` bytes, durably; the added range reads as zeros.

        Args:
            size: The new size in bytes, a multiple of 512.
            force: Whether to deallocate clusters past the old end, instead of raising an error.

        Raises:
            UsageError: The size is smaller than the present one, is not a multiple of 512, or
                is more than the tables can address.
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for the added range is bad, or refers to data and
                ``force`` is False; the disk has its old size.
            HostError: A system call failed; the disk has its old size.
        """
        self._components.disk_size.check(size)
        self._refuse_without_base("resize")
        await self._first_write_guard.prepare_write()
        await self._components.growth.grow(size, force=force)

    async def shrink(
        self, size: int, *, force: bool = False, progress: Progress | None = None
    ) -> None:
        """Shrink the disk to ``size`` bytes, durably.

        The caller must ensure that no other request is running.

        Args:
            size: The new size in bytes, a multiple of 512.
            force: Whether to shrink even if the removed part holds data of this image.
            progress: Called with the work done and the total; only their ratio has a meaning.

        Raises:
            UsageError: The size is larger than the present one, negative or not a multiple of 512,
                or data would be lost and ``force`` is False.
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for the removed part is bad; the disk has its old
                size, and a part of the range to be removed may read as zeros.
            HostError: A system call failed; the disk has its new size, or is as after
                CorruptImageError.
        """
        self._components.disk_size.check(size, shrink=True)
        self._refuse_without_base("resize")
        if not force:
            await self._components.shrinking.refuse_data(size)
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        await self._components.shrinking.shrink(size, progress)

    async def write_zero_clusters(self, start: int, length: int) -> None:
        """Turn the unallocated clusters of a range into zero clusters, whatever the base holds.

        ``start`` must be at a cluster boundary.  The end of the range must be at a cluster
        boundary, too, or at or past the end of the disk.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: An L1 entry for part of the range is bad.
            HostError: A system call failed; some clusters may be zero clusters now.
        """
        geometry = self.header.geometry
        await self._first_write_guard.prepare_write()
        await self._write_path.write_zero_clusters(
            start, geometry.ceil(min(start + length, self.size))
        )

    async def empty(self, progress: Progress | None = None) -> None:
        """Make all clusters unallocated, durably, so that the base shows everywhere.

        The caller must ensure that no other request is running.  For ``progress`` see `shrink`.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry is bad; some clusters may be unallocated now.
            HostError: A system call failed; some clusters may be unallocated now.
        """
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        await self._components.shrinking.empty(progress)

    async def set_backing(
        self, name: bytes, *, backing_is_raw: bool, versions: BaseVersions | None = None
    ) -> None:
        """Store the name of another base in the image, durably; an empty name removes the base.

        All earlier writes become durable before the name does.  This disk still reads from its old
        `chain` until it is closed.

        Args:
            name: The name as `backing_name` in `qedfuse.disk.creation.newheader` returns it.
            backing_is_raw: Whether the header must say that the base is raw.
            versions: The versions of the new bases to remember.  If None, the next open for writing
                remembers the versions that it finds.

        Raises:
            UsageError: The name is long, and the old one leaves no space for it
                (`new_name_offset`); nothing is changed then.
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: A system call failed; the image names the old base or the new one.
        """
        new_name_offset(self.header, len(name), self.name)
        await self._first_write_guard.prepare_write()
        await change_backing_name(
            *(self._file, self._header_store, self._writeback, self._flusher, name),
            backing_is_raw=backing_is_raw,
        )
        replace_versions(self._file, os.fsdecode(name), versions)

    def fstat(self) -> os.stat_result:
        """Return the attributes of the image file.

        Raises:
            HostError: A system call failed.
        """
        return self._file.stat()

    def stored_blocks(self) -> int:
        """Return the ``st_blocks`` of the image file, in units of 512 bytes.

        Raises:
            HostError: A system call failed.
        """
        return self._file.stored_blocks()

    def statvfs(self) -> os.statvfs_result:
        """Return the statistics of the host's file system that holds the image.

        Raises:
            HostError: The call failed.
        """
        return self._file.statvfs()

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times of the image file, in nanoseconds since 1970.

        Raises:
            OSError: A system call failed, for example because the file belongs to another user.
        """
        await self._file.set_times(atime_ns, mtime_ns)

    def statistics(self) -> DiskStatistics:
        """Return the present sizes of the disk, and what it has done since it was opened."""
        return collect_statistics(self._components)
