"""A range of a disk, such as a partition, as an array of bytes of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.errors import PastEndError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from qedfuse.disk.datapath.readtables import ReadTables
    from qedfuse.disk.disk import Disk
    from qedfuse.hostio.hostfile import Buffer, HostFile


class DiskWindow:
    """A range of a disk.

    The methods and their errors are those of `Disk`; none changes the size.  Offsets count from the
    beginning of the range, and no method reads or changes bytes past its end.

    Attributes:
        disk: The disk, whose lifetime the caller manages.
        start: Offset of the range in the disk, in bytes.
        size: Length of the range in bytes.
        name: The name for messages.
    """

    __slots__ = ("disk", "name", "size", "start")

    def __init__(self, disk: Disk, start: int, size: int, name: str) -> None:
        """Give a view of ``size`` bytes from guest offset ``start``, within the disk."""
        self.disk = disk
        self.start = start
        self.size = size
        self.name = name

    @property
    def writable(self) -> bool:
        """Whether the image may be modified."""
        return self.disk.writable

    @property
    def failure(self) -> str | None:
        """The message of the error that made the disk read-only; None without one."""
        return self.disk.failure

    @property
    def should_try_read(self) -> bool:
        """See `Disk.should_try_read`."""
        return self.disk.should_try_read

    def _contains(self, start: int, length: int) -> bool:
        """Return whether a range lies within the window."""
        return start >= 0 and start + length <= self.size

    def try_read(self, start: int, length: int) -> memoryview | None:
        """Read a range without waiting; see `Disk.try_read`."""
        if not self._contains(start, length):
            return None
        return self.disk.try_read(self.start + start, length)

    def tables_for_reads(self) -> ReadTables:
        """Return the objects with which the mount's extension answers reads by itself."""
        return self.disk.tables_for_reads()._replace(
            window_start=self.start, window_bytes=self.size
        )

    def try_locate(self, start: int, length: int) -> tuple[int, int, HostFile] | None:
        """Return where a range is stored, without waiting; see `Disk.try_locate`."""
        if not self._contains(start, length):
            return None
        return self.disk.try_locate(self.start + start, length)

    def count_read(self, file: HostFile, length: int) -> None:
        """Count a read at a location from `try_locate`; see `Disk.count_read`."""
        self.disk.count_read(file, length)

    def try_start_read(
        self,
        start: int,
        length: int,
        take_answer: Callable[[], object],
        ended: Callable[[int], object],
    ) -> bool:
        """Start a read that `try_read` could not make; see `Disk.try_start_read`."""
        return self._contains(start, length) and self.disk.try_start_read(
            self.start + start, length, take_answer, ended
        )

    def try_write(self, start: int, data: Buffer) -> bool:
        """Write bytes without waiting; see `Disk.try_write`."""
        return self._contains(start, len(data)) and self.disk.try_write(self.start + start, data)

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes; fewer if the window ends earlier, and none at or past its end."""
        length = max(0, min(length, self.size - start))
        return await self.disk.read(self.start + start, length) if length else b""

    async def write(self, start: int, data: Buffer) -> int:
        """Write bytes; return how many were written: all, unless the window ends earlier.

        Raises:
            PastEndError: The window ends at or before ``start``, and ``data`` is not empty.
            QedError: As in `Disk.write`.
        """
        view = memoryview(data).cast("B")
        if len(view) and start >= self.size:
            msg = f"{self.name}: write at {start}: the partition ends at {self.size}"
            raise PastEndError(msg)
        return await self.disk.write(self.start + start, view[: self.size - start])

    async def discard(self, start: int, length: int) -> None:
        """Make a range read as zeros, up to the end of the window."""
        length = min(length, self.size - start)
        if length > 0:
            await self.disk.discard(self.start + start, length)

    async def allocate(self, start: int, length: int) -> None:
        """Allocate each cluster of a range, up to the end of the window."""
        length = min(length, self.size - start)
        if length > 0:
            await self.disk.allocate(self.start + start, length)

    async def next_data(self, start: int) -> int | None:
        """Return the offset of the first data at or past ``start``; None if there is none."""
        if start >= self.size:
            return None
        found = await self.disk.next_data(self.start + start)
        return None if found is None or found - self.start >= self.size else found - self.start

    async def next_hole(self, start: int) -> int:
        """Return the offset of the first hole at or past ``start``; the end counts as a hole."""
        if start >= self.size:
            return self.size
        return min(await self.disk.next_hole(self.start + start) - self.start, self.size)

    def try_flush(self) -> bool:
        """Make all writes that have ended durable, if this needs no wait; see `Disk.try_flush`."""
        return self.disk.try_flush()

    async def flush(self) -> None:
        """Return when every write to the disk that had ended before this call is durable."""
        await self.disk.flush()

    def fstat(self) -> os.stat_result:
        """Return the attributes of the image file."""
        return self.disk.fstat()

    def stored_blocks(self) -> int:
        """Return the ``st_blocks`` of the image file, in units of 512 bytes."""
        return self.disk.stored_blocks()

    def statvfs(self) -> os.statvfs_result:
        """Return the statistics of the host's file system that holds the image."""
        return self.disk.statvfs()

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times of the image file, in nanoseconds since 1970."""
        await self.disk.set_times(atime_ns, mtime_ns)
