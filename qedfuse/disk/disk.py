"""The disk: an opened image, with its chain, as an array of bytes that can be changed.

`qedfuse.disk.opening.open_disk` opens a disk:

    async with open_disk("vm.qed", OpenOptions(writable=True)) as disk:
        await disk.write(0, b"...")
        await disk.flush()

D1 and D7 are rules in docs/durability.md.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from qedfuse.disk.components import Components
from qedfuse.disk.lifecycle import Lifecycle
from qedfuse.disk.lookup.rememberedbase import replace_base
from qedfuse.disk.lookup.seek import next_data, next_hole
from qedfuse.disk.state.backingname import change_backing_name
from qedfuse.disk.statistics import DiskStatistics, collect_statistics
from qedfuse.errors import BackingError, PastEndError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from qedfuse.disk.datapath.fastpath import ReadTables
    from qedfuse.disk.lookup.baseversion import BaseVersions
    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.disk.lookup.extents import Extent
    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.disk.options import OpenOptions
    from qedfuse.hostio.hostfile import Buffer, HostFile
    from qedfuse.ondisk.header import Header
    from qedfuse.util.backgroundtasks import Progress


class Disk:
    """One opened image.

    Tasks may call all methods concurrently, unless the method says otherwise.  A method that
    would modify the image raises `ReadOnlyError` if the disk is open read-only, or if an error
    has made it read-only (`failure`).  But `try_write` returns False, and `autocompact` returns
    without an error.

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
        """Build a disk over files that are open, locked and checked.

        The caller must enter `serving` before calling any other method.
        """
        self.path = path
        self.name = file.name
        components = self._components = Components(file, header, bases, options, store)
        self._lifecycle = Lifecycle(components)
        # The components that requests use are attributes of the disk as well, so that requests
        # need one attribute lookup less.
        self._file = file
        self._options = options
        self._layer = components.layer
        self._chain = components.chain
        self._file_reads = components.chain.file_reads
        self._header_store = components.header_store
        self._writeback = components.writeback
        self._flusher = components.flusher
        self._first_write_guard = components.first_write_guard
        self._epochs = components.epochs
        self._write_path = components.write_path
        self._fast_path = components.fast_path
        self._discard = components.discard
        # Without its base the image can still be changed as a file (compacted, for example), but
        # `_refuse_without_base` makes `write` and other methods raise.
        self._lacks_base = components.chain.lacks_base
        self._plain_writes = (
            file.writable and options.detect_zeroes == "off" and not self._lacks_base
        )

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Start the disk; close the disk cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image is open for writing, and two of its L2 tables overlap, so
                a change of one would damage the other.
            UsageError: A free list is requested (`OpenOptions.free_list`), but other data is
                where its descriptor must be.
            HostError: The host refused at the start, or something written could not be made
                durable at the close (D7).  In both cases the files are closed.
        """
        return self._lifecycle.serving()

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self._layer.size

    @property
    def writable(self) -> bool:
        """Whether the image may be modified.

        False if it is open read-only, or if an error has made it read-only (D7).
        """
        return self._file.writable and self._writeback.failure is None

    @property
    def failure(self) -> str | None:
        """The message of the error that made the disk read-only; None if no error has done so."""
        return None if self._writeback.failure is None else str(self._writeback.failure)

    @property
    def damaged(self) -> bool:
        """Whether a bad table entry or a cluster with two owners was found since the opening."""
        return self._layer.damaged

    @property
    def header(self) -> Header:
        """The present header."""
        return self._header_store.value

    @property
    def chain(self) -> Chain:
        """The image and those of its bases that are open."""
        return self._chain

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return how a range is stored in the whole chain.

        The part of the range past the end of the disk is left out, so the list may be empty.

        Raises:
            HostError: The host cannot read a table.
        """
        length = max(0, min(length, self.size - start))
        return await self._chain.extents(start, length) if length else []

    def try_read(self, start: int, length: int) -> memoryview | None:
        """Read a range without waiting; return None if that would block or fails.

        Returns None also if the range is empty, ends past the end of the disk, is too long for
        the fast path, or needs entries of two slices of a table.  After None the caller must use
        `read`.  The next call of this method or of `try_write` may overwrite the returned view.
        """
        return self._fast_path.try_read(start, length)

    def read_tables(self) -> ReadTables:
        """Return the objects with which the mount's extension answers reads by itself."""
        return self._fast_path.read_tables(self._epochs)

    @property
    def should_try_read(self) -> bool:
        """Whether `try_read` looks for the data of the image's file in the host's page cache.

        False after several reads in a row whose data was not there, until later reads are as
        fast as from the page cache (`ReadPolicy`).  Always False if the host's file system does
        not support such an attempt.
        """
        policy = self._file.read_policy
        return policy is None or policy.is_inline

    def try_locate(self, start: int, length: int) -> tuple[int, int] | None:
        """Return where a range is stored, as a descriptor and a file offset, without waiting.

        Returns None if the range is not known to be one run in one local file; see
        `FastPath.locate`.  The result is valid until the caller awaits something.
        """
        location = self._fast_path.locate(start, length)
        if location is None or (fd := location[0].fileno()) < 0:
            return None
        return fd, location[1]

    def count_read(self, start: int, length: int) -> None:
        """Count that the caller has read a range where `try_locate` has found it.

        The caller must not have awaited since then.
        """
        location = self._fast_path.locate(start, length)
        if location is not None:
            self._file_reads.count(location[0], length)

    def try_start_read(
        self,
        start: int,
        length: int,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read that `try_read` could not make; return whether a read was started.

        Returns False if a table is not in memory, if the data is not one run in one file, or if
        `HostFile.try_start_read` returns False.

        Args:
            start: Guest offset in bytes.
            length: Bytes to read.
            take_answer: See `HostFile.try_start_read`.
            ended: See `HostFile.try_start_read`.

        Raises:
            OSError: No thread exists, and none could be created.  ``ended`` is not called.
        """
        location = self._fast_path.locate(start, length)
        if location is None:
            return False
        file, offset = location
        epoch = self._epochs.enter()

        def leave(result: int) -> None:
            self._epochs.leave(epoch)
            if result == length:
                self._file_reads.count(file, length)
            ended(result)

        is_started = False
        try:
            is_started = file.try_start_read(
                offset, memoryview(bytearray(length)), take_answer, leave
            )
        finally:
            if not is_started:
                self._epochs.leave(epoch)
        return is_started

    def try_write(self, start: int, data: Buffer) -> bool:
        """Write bytes without waiting; return False if that would block or fails.

        Returns False also if ``data`` is empty, ends past the end of the disk, or needs entries
        of two slices of a table, or if the state or the options of the disk require `write`, as
        `OpenOptions.detect_zeroes` does.
        After False a part may have been written, so the caller must pass all of ``data`` to
        `write`.
        """
        return (
            self._plain_writes
            and self._first_write_guard.prepared
            and self._writeback.failure is None
            and self._fast_path.try_write(start, data)
        )

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes; fewer if the disk ends earlier, and none at or past its end.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            BackingError: The range needs a base that was not opened.
            HostError: The host cannot read a file.
        """
        length = max(0, min(length, self.size - start))
        epoch = self._epochs.enter()
        try:
            location = self._fast_path.locate(start, length)
            if location is not None:
                # The tables are in memory; only the data must come from the host.
                file, offset = location
                data = await file.pread(offset, length)
                if len(data) == length:
                    self._file_reads.count(file, length)
                    return data
            return await self._chain.read(start, length)
        finally:
            self._epochs.leave(epoch)

    async def write(self, start: int, data: Buffer) -> int:
        """Write bytes; return how many were written, fewer than given only if the disk ends.

        Returns 0 if ``data`` is empty.  Until `flush`, the bytes may be only in memory.

        Raises:
            PastEndError: The disk ends at or before ``start``, and ``data`` is not empty.
            NoSpaceError: The host is full.
            ReadOnlyError: The disk is open read-only, or became so.
            BackingError: The disk was opened without its base.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.

        After HostError, NoSpaceError or CorruptImageError a part may have been written.
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
            await self._discard.write(start, view, self._options.detect_zeroes)
        return len(view)

    async def discard(self, start: int, length: int) -> None:
        """Make a range read as zeros; ignore the part of the range past the end of the disk.

        If `OpenOptions.discard` is True, clusters that lie wholly in the range are deallocated.
        The last cluster of the disk counts as such a cluster if the range covers all its bytes
        up to the end of the disk.  If the option is False, allocated clusters stay allocated, and
        zeros are written over them.  With either value, unallocated clusters where the base has
        data become zero clusters.

        Raises:
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.  After this error, and after CorruptImageError, parts
                of the range may read as zeros.
        """
        if start >= self.size:
            return
        self._refuse_without_base("discard")
        await self._first_write_guard.prepare_write()
        async with AsyncExitStack() as stack:
            if start + length >= self.size and self.header.geometry.in_cluster(self.size):
                # The last cluster is deallocated together with its bytes past the end of the
                # disk.  If the disk grew meanwhile, the guest could write to these bytes, and
                # the deallocation would drop what it wrote.  So this task holds the lock that
                # a change of the size needs.
                await stack.enter_async_context(self._components.disk_size.lock)
            end = min(start + length, self.size)
            await self._discard.discard(start, end, free=self._options.discard)

    def _refuse_without_base(self, operation: str) -> None:
        """Raise if the disk was opened without its base; the message names ``operation``.

        Raises:
            BackingError: The image has a base, which was not opened.
        """
        if self._lacks_base:
            msg = (
                f"{self.name}: {operation}: found the image opened without its base, expected "
                "both open"
            )
            raise BackingError(msg)

    async def allocate(self, start: int, length: int) -> None:
        """Allocate each cluster of a range, and reserve its space on the host.

        The range reads as before.  The part of the range past the end of the disk is ignored.

        Raises:
            NoSpaceError: The host is full; parts of the range may be allocated now.
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad; other parts may be
                allocated now.
            HostError: The host refused; parts of the range may be allocated now.
        """
        end = min(start + length, self.size)
        if start < end:
            self._refuse_without_base("allocate")
            await self._first_write_guard.prepare_write()
            await self._write_path.allocate(start, end)

    def try_seek(self, start: int, *, data: bool) -> int | None:
        """Find the first data at or past ``start``, or the first hole if ``data`` is False.

        Returns:
            The guest offset; the disk's size if there is none.  None if the search would block
            or is not possible on the fast path, for example because the disk has a base.  After
            None the caller must use `next_data` or `next_hole`.
        """
        return self._fast_path.try_seek(start, data=data)

    async def next_data(self, start: int) -> int | None:
        """Return the guest offset of the first data at or past ``start``; None if there is none.

        Raises:
            HostError: The host cannot read a file.
        """
        return await next_data(self._chain, start)

    async def next_hole(self, start: int) -> int:
        """Return the guest offset of the first hole at or past ``start``.

        The end of the disk counts as a hole, so there always is one.

        Raises:
            HostError: The host cannot read a file.
        """
        return await next_hole(self._chain, start)

    @property
    def scan_is_short(self) -> bool:
        """Whether the scan for free clusters is not postponed, and takes only some milliseconds.

        The scan is postponed if the image has a valid free list: see `Scan.postpone`.  False also
        if the disk is open read-only, because a read-only disk has no scan.
        """
        scan = self._components.scan
        return self._file.writable and scan.is_short and not scan.is_postponed

    async def ensure_scanned(self) -> None:
        """Return when the scan for free clusters has ended, successfully or not.

        Runs the scan, or waits for the task that runs the scan.  Returns immediately if the scan
        has ended before.  The disk must be open for writing.
        """
        await self._components.scan.run()

    def try_flush(self) -> bool:
        """Make durable every write that has ended, without waiting; return whether that succeeded.

        After False the caller must use `flush`, which raises the host's error, if any.
        """
        return self._flusher.try_flush()

    async def flush(self) -> None:
        """Return when every write that had ended before this call survives power loss (D1).

        Raises:
            HostError: The host refused.  Once an error has made the disk read-only, each later
                call raises that error again (see `failure`).
        """
        await self._flusher.flush()

    def when_flushed(self, call: Callable[[], None]) -> None:
        """Call ``call`` at the end of each successful flush, also of background flushes.

        ``call`` replaces the function that was passed before.
        """
        self._flusher.listen(call)

    async def compact(self, progress: Progress | None = None, *, within_bound: bool = True) -> int:
        """Make the file as short as possible; return how many clusters were moved.

        The caller must ensure that no other request is running.  If the image cannot be
        compacted, for example because its free clusters are not known for certain, a warning is
        logged, nothing is moved, and the result is 0.  If a corrupt table entry is found, an
        error is logged, and the compaction ends early.  See `Compaction.run`.

        Args:
            progress: Called with the number of bytes moved so far, and with the number of bytes
                to move in all.
            within_bound: Whether the file must never become longer than its bound.  If so,
                some clusters may stay free.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused; the image is sound.
        """
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        return await self._components.compaction.run(progress, within_bound=within_bound)

    async def autocompact(self) -> None:
        """Compact now as the options demand for the close.

        A command calls this method if it reports the final length of the file while the disk is
        still open.  The file may become longer than its bound for a moment: the bound protects
        the host against guests, and no guest can call this method.  The caller must ensure that
        no other request is running.

        An error is logged as a warning and not raised.  An error that has made the disk read-only
        is not logged either, because the close raises it.
        """
        await self._lifecycle.autocompaction.run(within_bound=False)

    @property
    def uses_server(self) -> bool:
        """Whether a server has the image or a base."""
        return any(layer.file.fileno() < 0 for layer in self._chain.layers)

    def stop_fetching(self) -> None:
        """Make reads fail that wait for a server, and later ones that would; others go on."""
        for layer in self._chain.layers:
            layer.file.stop_fetching()

    def stop_compacting(self) -> None:
        """End the running compaction, if any; later compactions then move nothing.

        The image stays sound.
        """
        self._components.compaction.stop()

    async def grow(self, size: int, *, force: bool = False) -> None:
        """Grow the disk to ``size`` bytes, durably; the added range reads as zeros.

        Args:
            size: The new size in bytes, a multiple of 512.
            force: Whether to deallocate the clusters to which table entries past the old
                end refer, instead of raising an error.

        Raises:
            UsageError: The size is smaller than the present one, is no multiple of 512, or
                is more than the tables can address.
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for the added range is bad, or refers to data and
                ``force`` is False; the disk has its old size.
            HostError: The host refused; the disk has its old size.
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
            progress: Called with the work done so far and all the work, in the same unit, which
                has no meaning for the caller.

        Raises:
            UsageError: The size is larger than the present one, is negative or is no multiple
                of 512.  Or data would be lost, and ``force`` is False.
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for the removed part is bad; the disk has its old
                size, and a part of the range to be removed may read as zeros.
            HostError: The host refused; the disk has its old size or the new one.
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

        `discard` would create zero clusters only where the present base has data.  ``start``
        must be at a cluster boundary, and the end of the range at a cluster boundary, or at
        or past the end of the disk.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: An L1 entry for part of the range is bad.
            HostError: The host refused.  After this error, and after CorruptImageError, some
                clusters may be zero clusters now.
        """
        geometry = self.header.geometry
        await self._first_write_guard.prepare_write()
        await self._write_path.write_zero_clusters(
            start, geometry.ceil(min(start + length, self.size))
        )

    async def empty(self, progress: Progress | None = None) -> None:
        """Make all clusters unallocated, durably, so that the base shows everywhere.

        The caller must ensure that no other request is running.  ``progress`` is called with
        the work done so far and all the work, as for `shrink`.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry is bad; some clusters may be unallocated now.
            HostError: The host refused; some clusters may be unallocated now.
        """
        await self._first_write_guard.prepare_write()
        await self._components.scan.run()
        await self._components.shrinking.empty(progress)

    async def set_backing(
        self, name: bytes, *, raw: bool, versions: BaseVersions | None = None
    ) -> None:
        """Store the name of another base in the image, durably; an empty name removes the base.

        Everything that was written before this call becomes durable before the name does.
        This disk still reads from its old `chain` until it is closed.

        Args:
            name: The name as `backing_name` in `qedfuse.disk.creation.newheader` returns it.
            raw: Whether the header must say that the base is raw; ignored if ``name`` is empty.
            versions: The versions of the new bases, which are remembered.  If None, the next open
                for writing remembers the versions that it finds.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused; the image names the old base or the new one.
        """
        await self._first_write_guard.prepare_write()
        await change_backing_name(
            self._file, self._header_store, self._writeback, self._flusher, name, raw=raw
        )
        replace_base(self._file, os.fsdecode(name), versions)

    def fstat(self) -> os.stat_result:
        """Return the attributes of the image file.

        Raises:
            HostError: The host refused.
        """
        return self._file.stat()

    def stored_blocks(self) -> int:
        """Return the ``st_blocks`` of the image file, in units of 512 bytes.

        Raises:
            HostError: The host refused.
        """
        return self._file.stored_blocks()

    def statvfs(self) -> os.statvfs_result:
        """Return the statistics of the host's file system that holds the image.

        Raises:
            OSError: The call failed.
        """
        return self._file.statvfs()

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times of the image file, in nanoseconds since 1970.

        Raises:
            OSError: The host refused, for example because the file belongs to another user.
        """
        await self._file.set_times(atime_ns, mtime_ns)

    def statistics(self) -> DiskStatistics:
        """Return the present sizes of the disk, and what it has done since it was opened."""
        return collect_statistics(self._components)
