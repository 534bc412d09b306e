"""The disk: an opened image, with its chain, as an array of bytes that can be changed.

async with open_disk("vm.qed", OpenOptions(writable=True)) as disk:
    await disk.write(0, b"...")
    await disk.flush()
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.allocator import Allocator
from qedfuse.disk.basename import change_base_name
from qedfuse.disk.chain import Chain
from qedfuse.disk.commit import Commit, CommitStatistics
from qedfuse.disk.compaction import Compaction
from qedfuse.disk.discard import Discards
from qedfuse.disk.flatten import Below
from qedfuse.disk.grace import Grace
from qedfuse.disk.layer import QedLayer
from qedfuse.disk.liveheader import LiveHeader
from qedfuse.disk.needcheck import NeedCheck
from qedfuse.disk.quarantine import Quarantine
from qedfuse.disk.reclaim import Reclaim
from qedfuse.disk.requests import Requests
from qedfuse.disk.resize import Resizing
from qedfuse.disk.savedlist import SavedList
from qedfuse.disk.scan import Scan
from qedfuse.disk.seek import next_data, next_hole
from qedfuse.disk.shortcut import Shortcut
from qedfuse.errors import (
    HostError,
    NoSpaceError,
    ReadOnlyError,
)
from qedfuse.util.scope import open_scope

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable

    from qedfuse.disk.extents import Extent
    from qedfuse.disk.layer import Layer
    from qedfuse.disk.options import OpenOptions
    from qedfuse.disk.tablecache import SliceStore
    from qedfuse.hostio.hostfile import Buffer, HostFile
    from qedfuse.ondisk.header import Header
    from qedfuse.util.lru import LRUStatistics

log = logging.getLogger(__name__)

_SHORT_TABLES: Final = 8 << 20
"""Bytes of L2 tables that are scanned while the opener waits: those of 64 GiB of data."""


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """What a disk holds in memory and has done so far.

    Attributes:
        file_bytes: Where the last cluster in use ends.
        bound_bytes: The length that the file never needs to exceed.
        free_clusters: Clusters below the last one in use that are free; None while that
            is not known yet.
        quarantined_clusters: Clusters that lost their reference and are not free yet.
    """

    tables: LRUStatistics
    commit: CommitStatistics
    file_bytes: int
    bound_bytes: int
    free_clusters: int | None
    quarantined_clusters: int


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
        """Use files that are open, locked and checked; call `start` before anything else."""
        self.path = path
        self.name = file.name
        self._file = file
        self._store = store
        self._started = False
        self._closed = False
        self._layer = QedLayer(file, header, store)
        layers = [self._layer, *bases]
        below = Below(layers, self._layer, store) if bases else None
        self._chain = Chain(layers, below)
        self._live = LiveHeader(file, header)
        self._commit = Commit(file, self._layer.tables, options.commit_seconds)
        self._grace = Grace()
        self._allocator = Allocator(file, header, lambda: self._layer.missing_tables)
        self._quarantine = Quarantine(self._grace, self._allocator.make_map)
        self._reclaim = Reclaim(file, self._allocator, self._quarantine, self._commit)
        self._commit.reclaim = self._reclaim
        self._reclaim.before_change = self._before_change
        self._scan = Scan(self._layer, self._allocator, self._reclaim)
        self._needcheck = NeedCheck(
            self._layer,
            self._live,
            self._commit,
            self._allocator,
            options.needcheck_seconds,
        )
        self._requests = Requests(
            self._chain,
            self._layer,
            self._allocator,
            self._commit,
            self._needcheck,
            self._grace,
            options.cache_bytes // 2,
        )
        self._shortcut = Shortcut(
            self._chain,
            self._layer,
            self._commit,
            self._allocator,
            self._needcheck,
            self._requests,
        )
        self._discards = Discards(
            self._chain, self._layer, self._requests, self._commit, self._needcheck, self._reclaim
        )
        self._saved_list = SavedList(
            self._layer,
            self._live,
            self._commit,
            self._allocator,
            self._reclaim,
            self._scan,
            options,
            self._before_change,
        )
        self._compaction = Compaction(
            self._layer,
            self._allocator,
            self._requests,
            self._commit,
            self._needcheck,
            self._reclaim,
        )
        self._options = options
        self._opening_change = trio.Lock()
        self._may_change = not (header.stale_autoclear or header.free_list)
        self._plain_writes = file.writable and options.detect_zeroes == "off"
        self._resizing = Resizing(
            self._chain,
            self._layer,
            self._requests,
            self._commit,
            self._live,
            self._allocator,
            self._discards,
            self._needcheck,
            self._reclaim,
        )

    async def start(self, nursery: trio.Nursery) -> None:
        """Read what must be known first, and start the background tasks.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            UsageError: A free list is asked for that the image has no room for.
        """
        await self._layer.scan_l1()
        if self._file.writable:
            self._scan.begin()
            await self._saved_list.open()
            if self.header.need_check:
                # The bit is going to be cleared, which is a change like any other.
                await self._before_change()
            nursery.start_soon(self._commit.run)
            nursery.start_soon(self._needcheck.run)
            nursery.start_soon(self._scan.run)
            nursery.start_soon(self._saved_list.watch)
        self._started = True

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._layer.size

    @property
    def writable(self) -> bool:
        """Whether writes are accepted; a failed datasync ends that."""
        return self._file.writable and self._commit.failure is None

    @property
    def failure(self) -> str | None:
        """Why the disk went read-only, if it did."""
        return None if self._commit.failure is None else str(self._commit.failure)

    @property
    def damaged(self) -> bool:
        """Whether a table entry was found bad, or a cluster to have two owners."""
        return self._layer.damaged

    @property
    def header(self) -> Header:
        """The header as it is now."""
        return self._live.value

    @property
    def chain(self) -> Chain:
        """The image and its bases."""
        return self._chain

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Tell how a range is stored, along the whole chain."""
        length = max(0, min(length, self.size - start))
        return await self._chain.extents(start, length) if length else []

    def read_now(self, start: int, length: int) -> memoryview | None:
        """Read a range without waiting for anything; None if that cannot be: use `read`.

        What is returned holds until the next call.
        """
        return self._shortcut.read(start, length)

    def write_now(self, start: int, data: Buffer) -> bool:
        """Write bytes without waiting for anything; if that cannot be, use `write`."""
        return (
            self._plain_writes
            and self._may_change
            and self._commit.failure is None
            and self._shortcut.write(start, data)
        )

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read up to ``length`` bytes; fewer only where the disk ends.

        Raises:
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host cannot read a file.
        """
        length = max(0, min(length, self.size - start))
        turn = self._grace.enter()
        try:
            place = self._shortcut.place(start, length)
            if place is not None:
                # The host has to fetch the data; the tables are as near as ever.
                file, offset = place
                data = await file.pread(offset, length)
                if len(data) == length:
                    return data
            return await self._chain.read(start, length)
        finally:
            self._grace.leave(turn)

    async def write(self, start: int, data: Buffer) -> int:
        """Write bytes; return how many, fewer only where the disk ends.

        Raises:
            NoSpaceError: The disk ends at or before ``start``, or the host is full.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: The host refused.
        """
        view = memoryview(data).cast("B")
        if not len(view):
            return 0
        if start >= self.size:
            msg = f"{self.name}: write at {start}: the disk ends at {self.size}"
            raise NoSpaceError(msg)
        view = view[: self.size - start]
        await self._before_change()
        if self._options.detect_zeroes == "off":
            await self._requests.write(start, view)
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
        await self._before_change()
        async with AsyncExitStack() as stack:
            if start + length >= self.size and self.header.geometry.in_cluster(self.size):
                # What lies behind the end in the last cluster counts as nothing, so the
                # end must stay where it is.
                await stack.enter_async_context(self._resizing.lock)
            end = min(start + length, self.size)
            await self._discards.discard(start, end, free=self._options.discard)

    async def allocate(self, start: int, length: int) -> None:
        """Give each cluster of a range a place in the file, and room on the host.

        Raises:
            NoSpaceError: The host is full; parts of the range may have a place now.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
        """
        end = min(start + length, self.size)
        if start < end:
            await self._before_change()
            await self._requests.allocate(start, end)

    def seek_now(self, start: int, *, data: bool) -> int | None:
        """Do `next_data` or `next_hole` without waiting; None if that cannot be: use those.

        Returns:
            The guest offset; the disk's size if no data follows.
        """
        return self._shortcut.seek(start, data=data)

    async def next_data(self, start: int) -> int | None:
        """Find where the first data at or past ``start`` begins; None if there is none."""
        return await next_data(self._chain, start)

    async def next_hole(self, start: int) -> int:
        """Find where the first hole at or past ``start`` begins; the disk's end is one."""
        return await next_hole(self._chain, start)

    @property
    def short_to_scan(self) -> bool:
        """Whether the tables are so few that the scan is a matter of some milliseconds."""
        tables = len(self._layer.l2_tables) * self.header.geometry.table_bytes
        return self._file.writable and tables <= _SHORT_TABLES

    async def scanned(self) -> None:
        """Return when the free space of the file is known, or never will be."""
        await self._reclaim.ready.wait()

    async def flush(self) -> None:
        """Return when every write that has ended survives power loss (D1).

        Raises:
            HostError: The host could not do it.
        """
        await self._commit.flush()

    def when_flushed(self, call: Callable[[], None]) -> None:
        """Have ``call`` called at the end of each flush, those in the background included."""
        self._commit.flushed = call

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
        await self._before_change()
        await self._scan.run()
        return await self._compaction.run(progress, within_bound=within_bound)

    async def resize(
        self,
        size: int,
        *,
        force: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Grow the disk to ``size`` bytes, a multiple of 512; what is added reads as zeros.

        Args:
            size: Bytes.
            force: Drop what table entries past the old end refer to.
            progress: Called with the bytes of the disk dropped so far and in all.

        Raises:
            UsageError: The disk would shrink, or the tables cannot address that much.
            ReadOnlyError: The disk is open read-only.
            CorruptImageError: Table entries past the end are in use.
        """
        self._resizing.check(size)
        await self._before_change()
        await self._resizing.resize(size, force=force, progress=progress)

    async def shrink(
        self,
        size: int,
        *,
        force: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Make the disk shorter; no other request may be under way.

        Args:
            size: Bytes, a multiple of 512.
            force: Also where the part that goes holds data of this image, which is lost.
            progress: Called with the bytes of the disk given up so far and in all.

        Raises:
            UsageError: It would grow, or data would be lost.
            ReadOnlyError: The disk is open read-only.
            CorruptImageError: A table entry for the part that goes is bad.
        """
        self._resizing.check(size, shrink=True)
        if not force:
            await self._resizing.refuse_data(size)
        await self._before_change()
        await self._scan.run()
        await self._resizing.shrink(size, progress)

    async def hide(self, start: int, length: int) -> None:
        """Make zero clusters of the unallocated ones in a range, whatever the base shows there.

        `discard` does so only where the present base has data.  ``start`` and the range's
        end are at cluster boundaries, or the end is past that of the disk.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused.
        """
        geometry = self.header.geometry
        await self._before_change()
        await self._requests.set_zero(start, geometry.ceil(min(start + length, self.size)))

    async def empty(self) -> None:
        """Make all clusters unallocated, so that the base shows everywhere, durably.

        No other request may be under way.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry is bad; a part may be empty.
            HostError: The host refused; a part may be empty.
        """
        await self._before_change()
        await self._scan.run()
        await self._resizing.empty()

    async def name_base(self, name: bytes, *, raw: bool) -> None:
        """Write another base's name into the image, or none; `chain` remains the old one.

        Everything written before is durable before the name is, and that at the end.

        Raises:
            ReadOnlyError: The disk is open read-only, or became so.
            HostError: The host refused; the image names the old base, or the new one.
        """
        await self._before_change()
        await change_base_name(self._file, self._live, self._commit, name, raw=raw)

    async def _before_change(self) -> None:
        """Refuse a change if the disk is read-only; clear what the first one makes untrue."""
        if not self.writable:
            why = self.failure or "opened read-only"
            msg = f"{self.name}: read-only: {why}"
            raise ReadOnlyError(msg)
        if not self._may_change:
            async with self._opening_change:
                # All writers wait here for the first one: not even data may change
                # before the program that owns the autoclear bits can tell, and before
                # the saved free list is invalid.
                if not self._may_change:
                    await self._live.change(
                        lambda header: header.without_stale_autoclear().with_free_list(value=False)
                    )
                    await self._commit.barrier()
                    await self._saved_list.forget()
                    self._may_change = True

    def fstat(self) -> os.stat_result:
        """Give the attributes of the image file."""
        return self._file.stat()

    def statistics(self) -> DiskStatistics:
        """Tell what the disk holds in memory and has done."""
        allocator = self._allocator
        return DiskStatistics(
            tables=self._store.statistics(),
            commit=self._commit.statistics(),
            file_bytes=allocator.end,
            bound_bytes=allocator.bound,
            free_clusters=allocator.free.count if allocator.known else None,
            quarantined_clusters=self._quarantine.count,
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Start the disk; close it cleanly at the end of the ``async with`` block.

        Raises:
            CorruptImageError: The image cannot be written to without damage.
            HostError: As `close`.
        """
        try:
            async with open_scope() as nursery:
                await self.start(nursery)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            # The background tasks have ended: closing has the disk to itself.
            await self.close()

    async def _give_space_back(self) -> None:
        """Cut off and punch out what is free, as far as that is known.

        A disk that was not changed is not kept waiting for the scan, unless its free
        clusters are to be listed.
        """
        await self._commit.flush()
        needed = self._quarantine.count or self._saved_list.wanted
        if needed and not self._reclaim.ready.is_set():
            await self._scan.run()
        if self._reclaim.pending:
            await self._reclaim.run(punches=None)

    async def _compact_at_close(self) -> None:
        """Compact; what the host refuses costs space and nothing else."""
        try:
            await self.compact()
        except HostError as error:
            log.warning("%s (while compacting)", error)

    async def close(self) -> None:
        """Make everything durable, clear NEED_CHECK, and let the files and locks go.

        Raises:
            HostError: Something written before could not be made durable (D7).  The
                files are closed all the same, and NEED_CHECK stays.
        """
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            try:
                # An image that was refused by `start` is left as it was found.
                if self.writable and self._started:
                    if self._options.compact:
                        await self._compact_at_close()
                    await self._give_space_back()
                    await self._needcheck.clear()
                    await self._commit.flush()
                    await self._saved_list.save()
                elif self._commit.failure is not None:
                    raise self._commit.failure
            finally:
                self._chain.close()
