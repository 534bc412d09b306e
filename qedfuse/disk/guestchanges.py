"""Changes of a disk by its guest: writes, discards, allocations, and flushes.

D1 and D7 are rules in docs/durability.md.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from qedfuse.disk.datapath.readtables import InPlaceWrites, ReadTables
from qedfuse.disk.guestreads import GuestReads
from qedfuse.errors import BackingError, PastEndError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.disk.components import Components
    from qedfuse.hostio.hostfile import Buffer


class GuestChanges(GuestReads):
    """Reads and changes an opened image with its chain.

    Tasks may call all methods concurrently.  If the disk is or has become read-only, the methods
    that would change the guest's data raise `ReadOnlyError`, and `try_write` returns False.

    Attributes:
        name: The name of the image file, escaped for messages.
    """

    def __init__(self, components: Components) -> None:
        """Read and change the disk that consists of ``components``."""
        super().__init__(components)
        file, options = components.file, components.options
        self.name = file.name
        self._options = options
        self._writeback = components.writeback
        self._flusher = components.flusher
        self._first_write_guard = components.first_write_guard
        self._write_path = components.write_path
        self._discard = components.discard
        # Without its base the image can still be compacted, for example, but not written to.
        self._lacks_base = components.chain.lacks_base
        self._plain_writes = (
            file.writable and options.detect_zeroes == "off" and not self._lacks_base
        )

    @property
    def writable(self) -> bool:
        """Whether the image may be modified; False once an error has made it read-only (D7)."""
        return self._file.writable and self._writeback.failure is None

    @property
    def failure(self) -> str | None:
        """The message of the error that made the disk read-only; None if no error has done so."""
        return None if self._writeback.failure is None else str(self._writeback.failure)

    def tables_for_reads(self) -> ReadTables:
        """Return what the mount's extension needs for reads, and perhaps for writes in place."""
        tables = super().tables_for_reads()
        target = self._file.write_target
        if target is None or not self._plain_writes:
            return tables
        writes = InPlaceWrites(
            *(target.fd, target.inode, target.is_short, self._first_write_guard, self._writeback),
            partial(self._record_in_place, target.record_write),
        )
        return tables._replace(writes=writes)

    def _record_in_place(
        self, record_write: Callable[[int, float], None], length: int, seconds: float
    ) -> None:
        """Record that the extension has written ``length`` bytes in ``seconds``."""
        # First, so that a flush covers the write even if the second call raises.
        self._writeback.note_write()
        record_write(length, seconds)

    def try_write(self, start: int, data: Buffer) -> bool:
        """Write bytes without waiting; return False if that would block or fail.

        Returns False also if ``data`` is empty, ends past the end of the disk, or needs entries of
        two slices of a table.  Until the image has been prepared for its first change, and if zeros
        are detected (``detect_zeroes``), the result is always False.  After False a part may have
        been written, so the caller must pass all of ``data`` to `write`.
        """
        return (
            self._plain_writes
            and self._first_write_guard.prepared
            and self._writeback.failure is None
            and self._fast_path.try_write(start, data)
        )

    async def write(self, start: int, data: Buffer) -> int:
        """Write bytes; return how many were written: all that lie within the disk.

        Returns 0 if ``data`` is empty.  Until `flush`, the bytes may be only in memory.  After an
        error a part may have been written.

        Raises:
            PastEndError: The disk ends at or before ``start``, and ``data`` is not empty.
            NoSpaceError: The host is full.
            ReadOnlyError: The disk is open read-only, or became so.
            BackingError: The disk was opened without its base.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: A system call failed.
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

        Allocated clusters that lie wholly in the range are deallocated if `OpenOptions.discard` is
        True, and otherwise overwritten with zeros.  Unallocated ones become zero clusters where the
        base has data.  Clusters that lie only partly in the range are overwritten with zeros there;
        the part of the last cluster past the end of the disk does not count.  After an error parts
        of the range may read as zeros.

        Raises:
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: A system call failed.
        """
        if start >= self.size:
            return
        self._refuse_without_base("discard")
        await self._first_write_guard.prepare_write()
        async with AsyncExitStack() as stack:
            if start + length >= self.size and self._layer.geometry.in_cluster(self.size):
                # The last cluster is deallocated together with its bytes past the end of the disk.
                # If the disk grew during this call, the guest could write to these bytes, and then
                # lose what it wrote.  So this task holds the lock that a change of the size needs.
                await stack.enter_async_context(self._components.disk_size.lock)
            end = min(start + length, self.size)
            await self._discard.discard(start, end, free=self._options.discard)

    async def allocate(self, start: int, length: int) -> None:
        """Allocate each cluster of a range, and reserve its space on the host.

        The range reads as before.  The part of the range past the end of the disk is ignored.
        After an error parts of the range may be allocated.

        Raises:
            NoSpaceError: The host is full.
            BackingError: The disk was opened without its base.
            ReadOnlyError: The disk is open read-only, or became so.
            CorruptImageError: A table entry for part of the range is bad.
            HostError: A system call failed.
        """
        end = min(start + length, self.size)
        if start < end:
            self._refuse_without_base("allocate")
            await self._first_write_guard.prepare_write()
            await self._write_path.allocate(start, end)

    def _refuse_without_base(self, operation: str) -> None:
        """Raise `BackingError` if the disk was opened without its base."""
        if self._lacks_base:
            msg = (
                f"{self.name}: {operation}: needs the base, but the image was opened without its "
                "base"
            )
            raise BackingError(msg)

    def try_flush(self) -> bool:
        """Make durable every write that has ended, without waiting; return whether that succeeded.

        After False the caller must use `flush`, which raises the host's error, if any.
        """
        return self._flusher.try_flush()

    async def flush(self) -> None:
        """Return when every write that had ended before this call survives power loss (D1).

        Raises:
            HostError: A system call failed.  Once an error has made the disk read-only, each later
                call raises that error again (see `failure`).
            ReadOnlyError: The writes are durable, but the disk has become read-only while the call
                gave space back to the host.
        """
        await self._flusher.flush()

    def when_flushed(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at the end of each successful flush, background flushes included.

        ``listener`` replaces the one of the previous call.
        """
        self._flusher.listen(listener)
