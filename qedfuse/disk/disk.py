"""The disk: an opened image, with its chain, as an array of bytes that can be changed.

async with open_disk("vm.qed", OpenOptions(writable=True)) as disk:
    await disk.write(0, b"...")
    await disk.flush()
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qedfuse.disk.components import Components
from qedfuse.disk.lifecycle import Lifecycle
from qedfuse.disk.lookup.seek import next_data, next_hole
from qedfuse.disk.state.backingname import change_backing_name
from qedfuse.disk.statistics import DiskStatistics, collect_statistics
from qedfuse.errors import BackingError, PastEndError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.disk.options import OpenOptions
    from qedfuse.hostio.hostfile import Buffer, HostFile
    from qedfuse.ondisk.header import Header


class Disk:
    """One opened image.  All methods may be called by many tasks at once.

    Attributes:
        path: The image as the user named it.
        name: The same, fit to be printed.
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
        """Use files that are open, locked and checked; enter `serving` before anything else."""
        self.path = path
        self.name = file.name
        components = self._components = Components(file, header, bases, options, store)
        self._lifecycle = Lifecycle(components)
        # What each request needs is at hand; the rest is asked of the parts.
        self._file = file
        self._options = options
        self._layer = components.layer
        self._chain = components.chain
        self._header_store = components.header_store
        self._writeback = components.writeback
        self._flusher = components.flusher
        self._first_write_guard = components.first_write_guard
        self._epochs = components.epochs
        self._write_path = components.write_path
        self._fast_path = components.fast_path
        self._discards = components.discard
        # An image whose base was left out can be worked on as a file, not as a disk.
        self._lacks_base = components.chain.lacks_base
        self._plain_writes = (
            file.writable and options.detect_zeroes == "off" and not self._lacks_base
        )

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Start the disk; close it cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            UsageError: A free list is asked for that the image has no room for.
            HostError: Something written before could not be made durable (D7).
        """
        return self._lifecycle.serving()

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._layer.size

    @property
    def writable(self) -> bool:
        """Whether writes are accepted; a failed datasync ends that."""
        return self._file.writable and self._writeback.failure is None

    @property
    def failure(self) -> str | None:
        """Why the disk went read-only, if it did."""
        return None if self._writeback.failure is None else str(self._writeback.failure)

    @property
    def damaged(self) -> bool:
        """Whether a table entry was found bad, or a cluster to have two owners."""
        return self._layer.damaged

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self._header_store.value

    @property
    def chain(self) -> Chain:
        """The image and its bases."""
        return self._chain

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell how a range is stored, along the whole chain."""
        length = max(0, min(length, self.size - start))
        return await self._chain.extents(start, length) if length else []

    def try_read(self, start: int, length: int) -> memoryview | None:
        """Read a range without waiting for anything; None if that cannot be: use `read`.

        What is returned holds until the next call.
        """
        return self._fast_path.try_read(start, length)

    def try_write(self, start: int, data: Buffer) -> bool:
        """Write bytes without waiting for anything; if that cannot be, use `write`."""
        return (
            self._plain_writes
            and self._first_write_guard.prepared
            and self._writeback.failure is None
            and self._fast_path.try_write(start, data)
        )

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read up to ``length`` bytes; fewer only where the disk ends.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """
        length = max(0, min(length, self.size - start))
        turn = self._epochs.enter()
        try:
            location = self._fast_path.locate(start, length)
            if location is not None:
                # The host has to fetch the data; the tables are as near as ever.
                file, offset = location
                data = await file.pread(offset, length)
                if len(data) == length:
                    return data
            return await self._chain.read(start, length)
        finally:
            self._epochs.leave(turn)

    async def write(self, start: int, data: Buffer) -> int:
        """Write bytes; return how many, fewer only where the disk ends.

        Raises:
            PastEndError: The disk ends at or before ``start``.
            NoSpaceError: The host is full.
            ReadOnlyError: The disk is open read-only, or became so.
            BackingError: The disk was opened without its base.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.
        """
        view = memoryview(data).cast("B")
        if not len(view):
            return 0
        if start >= self.size:
            msg = f"{self.name}: write at {start}: the disk ends at {self.size}"
            raise PastEndError(msg)
        view = view[: self.size - start]
        self._refuse_without_base("write")
        await self._first_write_guard.prepare_write()
        if self._options.detect_zeroes == "off":
            await self._write_path.write(start, view)
        else:
            await self._discards.write(start, view, self._options.detect_zeroes)
        return len(view)

    async def discard(self, start: int, length: int) -> None:
        """Make a range read as zeros and give up its whole clusters; clipped at the disk's end.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.
        """
        if start >= self.size:
            return
        self._refuse_without_base("discard")
        await self._first_write_guard.prepare_write()
        async with AsyncExitStack() as stack:
            if start + length >= self.size and self.header.geometry.in_cluster(self.size):
                # What lies behind the end in the last cluster counts as nothing, so the
                # end must stay where it is.
                await stack.enter_async_context(self._components.resize.lock)
            end = min(start + length, self.size)
            await self._discards.discard(start, end, free=self._options.discard)

    def _refuse_without_base(self, what: str) -> None:
        """Refuse a change of content where the base, which was left out, would show through.

        Raises:
            BackingError: The image has a base, and was opened without it.
        """
        if self._lacks_base:
            msg = f"{self.name}: {what}: found the image opened without its base, expected with it"
            raise BackingError(msg)

    async def allocate(self, start: int, length: int) -> None:
        """Give each cluster of a range a place in the file, and room on the host.

        Raises:
            NoSpaceError: The host is full; parts of the range may have a place now.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
        """
        end = min(start + length, self.size)
        if start < end:
            self._refuse_without_base("allocate")
            await self._first_write_guard.prepare_write()
            await self._write_path.allocate(start, end)

    def try_seek(self, start: int, *, data: bool) -> int | None:
        """Do `next_data` or `next_hole` without waiting; None if that cannot be: use those.

        Returns:
            The guest offset; the disk's size if no data follows.
        """
        return self._fast_path.try_seek(start, data=data)

    async def next_data(self, start: int) -> int | None:
        """Find where the first data at or past ``start`` begins; None if there is none."""
        return await next_data(self._chain, start)

    async def next_hole(self, start: int) -> int:
        """Find where the first hole at or past ``start`` begins; the disk's end is one."""
        return await next_hole(self._chain, start)

    @property
    def short_to_scan(self) -> bool:
        """Whether a scan is under way that is a matter of some milliseconds."""
        scan = self._components.scan
        return self._file.writable and scan.is_short and not scan.is_postponed

    async def wait_scanned(self) -> None:
        """Return when the free space of the file is known, or never will be."""
        await self._components.scan.run()

    async def flush(self) -> None:
        """Return when every write that has ended survives power loss (D1).

        Raises:
            HostError: The host could not do it.
        """
        await self._flusher.flush()

    def when_flushed(self, call: Callable[[], None]) -> None:
        """Have ``call`` called at the end of each flush, those in the background included."""
        self._flusher.listen(call)

    async def compact(
        self, progress: Callable[[int, int], None] | None = None, *, within_bound: bool = True
    ) -> int:
        """Make the file as short as it can be; no other request may be under way.

        Args:
            progress: Called with the bytes moved so far and in all.
            within_bound: Whether a free cluster is rather left than the file made longer
                than its bound for a moment.

        Returns:
            How many clusters were moved.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused; the image is sound.
        """
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        return await self._components.compaction.run(progress, within_bound=within_bound)

    async def tidy(self) -> None:
        """Compact now as the options want it at the close, where nothing is left to do then.

        For commands that say what they leave: no guest can set it off, so the file may
        exceed its bound for a moment.  No other request may be under way.  What the host
        refuses is logged.
        """
        await self._lifecycle.compaction.run(within_bound=False)

    def stop_compacting(self) -> None:
        """End the compaction that a close has begun, or is about to; the image is sound."""
        self._components.compaction.stop()

    async def resize(self, size: int, *, force: bool = False) -> None:
        """Grow the disk to ``size`` bytes, a multiple of 512; what is added reads as zeros.

        Args:
            size: Bytes.
            force: Drop what table entries past the old end refer to.

        Raises:
            UsageError: The disk would shrink, or the tables cannot address that much.
            ReadOnlyError: The disk is open read-only.
            CorruptImageError: Table entries past the end are in use.
        """
        self._components.resize.check(size)
        self._refuse_without_base("resize")
        await self._first_write_guard.prepare_write()
        await self._components.resize.resize(size, force=force)

    async def shrink(
        self, size: int, *, force: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Make the disk shorter; no other request may be under way.

        Args:
            size: Bytes, a multiple of 512.
            force: Also where the part that goes holds data of this image, which is lost.
            progress: Called with how much is done of how much, in any unit.

        Raises:
            UsageError: It would grow, or data would be lost.
            ReadOnlyError: The disk is open read-only.
            CorruptImageError: A table entry for the part that goes is bad.
        """
        self._components.resize.check(size, shrink=True)
        self._refuse_without_base("resize")
        if not force:
            await self._components.resize.refuse_data(size)
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        await self._components.resize.shrink(size, progress)

    async def write_zero_clusters(self, start: int, length: int) -> None:
        """Make zero clusters of the unallocated ones in a range, whatever the base shows there.

        `discard` does so only where the present base has data.  ``start`` and the range's
        end are at cluster boundaries, or the end is past that of the disk.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused.
        """
        geometry = self.header.geometry
        await self._first_write_guard.prepare_write()
        await self._write_path.write_zero_clusters(
            start, geometry.ceil(min(start + length, self.size))
        )

    async def empty(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Make all clusters unallocated, so that the base shows everywhere, durably.

        No other request may be under way; ``progress`` is called with how much is done of
        how much, in any unit.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry is bad; a part may be empty.
            HostError: The host refused; a part may be empty.
        """
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        await self._components.resize.empty(progress)

    async def set_backing(self, name: bytes, *, raw: bool) -> None:
        """Write another base's name into the image, or none; `chain` remains the old one.

        Everything written before is durable before the name is, and that at the end.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused; the image names the old base, or the new one.
        """
        await self._first_write_guard.prepare_write()
        await change_backing_name(
            self._file, self._header_store, self._writeback, self._flusher, name, raw=raw
        )

    def fstat(self) -> os.stat_result:
        """Give the attributes of the image file."""
        return self._file.stat()

    def statvfs(self) -> os.statvfs_result:
        """Describe the host's file system that takes the writes.

        Raises:
            OSError: It cannot be asked.
        """
        return self._file.statvfs()

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times of the image file, in nanoseconds since 1970.

        Raises:
            OSError: The file belongs to another user.
        """
        await self._file.set_times(atime_ns, mtime_ns)

    def statistics(self) -> DiskStatistics:
        """Tell what the disk holds in memory and has done."""
        return collect_statistics(self._components)
