"""What the disk asks of the file that holds an image; small enough to stand in for.

`qedfuse.hostio.posixfile.PosixFile` is the real thing.  Tests put other files behind the
same protocol: one that records what is written, one that fails at a chosen step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import os

Buffer: TypeAlias = bytes | bytearray | memoryview


class HostFile(Protocol):
    """What the disk asks of the file that holds an image.  Offsets and lengths in bytes.

    Each method raises `HostError` (`NoSpaceError` for a full file system) when the host
    refuses.  Nothing is durable before `datasync` has returned.
    """

    name: str
    writable: bool
    can_punch: bool

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read ``length`` bytes; fewer only where the file ends."""

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view``; return how many bytes there were before the file ended."""

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if that needs no waiting; if it is not filled, something is amiss."""

    def is_short(self, length: int) -> bool:
        """Tell whether a write of so many bytes is short enough for `try_write`."""

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write what is short enough not to wait for; if it was not all written, do it again."""

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write the parts one behind the other, as one write."""

    async def datasync(self) -> None:
        """Make everything written so far, and the file's length, survive power loss."""

    def try_grow(self, size: int) -> bool:
        """Make the file longer if that needs no waiting; if it is not, something is amiss."""

    async def truncate(self, size: int) -> None:
        """Set the file's length; what is added reads as zeros."""

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Give the space of ranges, offset and length, back to the host; they read as zeros then.

        Where the host cannot, nothing happens, and ``can_punch`` is false from then on.
        """

    async def reserve(self, offset: int, length: int) -> None:
        """Make sure that later writes to a range inside the file find room.

        Where the host cannot promise that, nothing happens.
        """

    async def next_data(self, offset: int) -> int | None:
        """Find where the first data at or past ``offset`` begins; None if only holes follow."""

    async def next_hole(self, offset: int) -> int | None:
        """Find where the first hole at or past ``offset`` begins; the file's end is one."""

    def size(self) -> int:
        """Give the file's length now."""

    def stat(self) -> os.stat_result:
        """Give the file's attributes now."""

    def statvfs(self) -> os.statvfs_result:
        """Describe the host's file system that holds the file.

        Raises:
            OSError: It cannot be asked.
        """

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the file's times, in nanoseconds since 1970.

        Raises:
            OSError: The file belongs to another user.
        """

    def close(self) -> None:
        """Let the file go, and with it every lock taken through it."""
