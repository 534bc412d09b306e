"""Answers read, write and fsync requests that need not wait, without a coroutine for each.

An error in this first attempt is not reported: `Operations`, the slow path, makes a second attempt,
meets the same error, and reports it to the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.mount.fuse.handles import FAST_LOOKUP_MASK, HANDLE_FLAGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.mount.fuse.exporteddisk import ExportedDisk


class FastRequests:
    """Tries to answer requests without waiting.

    A request that is not answered may have been carried out in part, and must be carried out as a
    whole on the slow path.  An exception means that the request is not answered.

    Attributes:
        disks: The disks by inode number.
    """

    def __init__(self, disks: Mapping[int, ExportedDisk]) -> None:
        """Answer requests to ``disks``, which are mapped by inode number."""
        self.disks = disks

    def disk_of(self, handle: int) -> ExportedDisk | None:
        """Return the disk of a handle; None if its reads and writes take the slow path."""
        return self.disks.get(handle & FAST_LOOKUP_MASK)

    def read(self, handle: int, offset: int, size: int) -> memoryview | None:
        """Read ``size`` bytes at guest offset ``offset``; return None if that would wait or fails.

        Also returns None for a read that is empty or goes past the end of the disk.  The next call
        of any method may overwrite the result.
        """
        exported = self.disk_of(handle)
        return None if exported is None else exported.disk.try_read(offset, size)

    def write(self, handle: int, offset: int, data: Buffer) -> bool:
        """Write ``data`` at guest offset ``offset``; return False if the write is not complete.

        Returns False if the write would wait or fails, goes past the end of the disk, or must be
        durable before the reply.  No reference to ``data`` is kept.
        """
        exported = self.disk_of(handle)
        return exported is not None and exported.disk.try_write(offset, data)

    def fsync(self, handle: int) -> bool:
        """Make durable all writes that have ended; return False if that would wait or fails.

        Also returns False if the disk has lost writes; the slow path then reports the error.
        """
        exported = self.disks.get(handle & ~HANDLE_FLAGS)
        return (
            exported is not None
            and not exported.overrun
            and exported.disk.failure is None
            and exported.disk.try_flush()
        )
