"""An image that is there already, written through its open disk like a guest does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.tools.common.blocks import runs
from qedfuse.tools.target.target import SequentialTarget

if TYPE_CHECKING:
    from qedfuse.disk.disk import Disk
    from qedfuse.tools.common.blocks import Mask


class DiskTarget(SequentialTarget):
    """A disk; clusters of zeros are given up."""

    def __init__(self, disk: Disk) -> None:
        """Write to an open disk that is at least as long as the other."""
        self._disk = disk
        self.unit = disk.header.cluster_size
        self._at = 0

    async def take(self, start: int, view: memoryview, data: Mask) -> None:
        """Write the piece, and zeros before it."""
        await self._clear(start)
        for first, last in runs(data):
            await self._clear(start + first * self.unit)
            part = view[first * self.unit : last * self.unit]
            await self._disk.write(start + first * self.unit, part)
            self._at = start + first * self.unit + len(part)
        await self._clear(start + len(view))

    async def _clear(self, end: int) -> None:
        """Make everything up to an offset zeros that was not written."""
        if self._at < end:
            await self._disk.discard(self._at, end - self._at)
            self._at = end

    async def complete(self, size: int) -> None:
        """Clear the rest of the disk that was copied, and make everything durable."""
        await self._clear(size)
        await self._disk.flush()
