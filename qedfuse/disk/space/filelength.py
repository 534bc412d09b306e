"""The length of an image's file: grown in steps ahead of the data, and cut when it is idle.

A write into a new cluster never extends the file itself.  So the rule that growing must
never shorten the file has one place and one lock, and one system call serves many
clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.ondisk.constants import MAX_OFFSET

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

MIN_GROWTH_BYTES: Final = 1 << 20
"""How far the file is grown ahead of what is needed, at least."""
MAX_GROWTH_BYTES: Final = 1 << 24
"""The same, at most.  It takes up no space on the host before it is written to."""
_GROWTH_DIVISOR: Final = 16
"""Between the two limits the file is grown ahead by its length divided by this."""


class FileLength:
    """Keeps the file as long as the clusters that the allocator hands out.

    Attributes:
        end: How many bytes of the file are whole clusters.
        has_odd_tail: Whether the file holds bytes behind the last whole cluster.  They
            belong to no cluster, but would show up in a new one.
        lock: Held while the length changes.
    """

    def __init__(self, file: HostFile, geometry: Geometry, allocator: Allocator) -> None:
        """Start from the present length of ``file``."""
        self._file = file
        self._geometry = geometry
        self._allocator = allocator
        size = file.size()
        self.end = geometry.floor(size)
        self.has_odd_tail = self.end != size
        self.lock = trio.Lock()

    async def grow(self, end: int) -> None:
        """Make the file at least ``end`` bytes long.

        Raises:
            HostError: The host refused.
        """
        if end <= self.end:
            return
        async with self.lock:
            if end <= self.end:
                return
            if self.has_odd_tail:
                # A crash could lose the cut and keep the growth, but not once an entry
                # refers to the new cluster: both come before the first datasync of the
                # cycle that writes the entry.
                await self._file.truncate(self.end)
                self.has_odd_tail = False
            target = self._target(end)
            if not self._file.try_grow(target):
                await self._file.truncate(target)
            self.end = target

    def try_grow(self, end: int) -> bool:
        """Make the file at least ``end`` bytes long; returns False if that would block.

        The length is unchanged then.
        """
        if end > self.end:
            target = self._target(end)
            blocked = self.has_odd_tail or self.lock.locked() or target > MAX_OFFSET
            if blocked or not self._file.try_grow(target):
                return False
            self.end = target
        return True

    def _target(self, end: int) -> int:
        """Choose the file's new length: at least ``end``, and ahead of it within the bound."""
        step = max(MIN_GROWTH_BYTES, min(MAX_GROWTH_BYTES, end // _GROWTH_DIVISOR))
        return max(end, min(self._geometry.ceil(end + step), self._allocator.bound))

    async def truncate_tail(self) -> bool:
        """Cut off the part of the file past the allocator's end; return whether there was one.

        A crash may lose the cut.  What the file grows by afterwards reads as zeros; `grow`
        explains why that needs no datasync.

        Raises:
            HostError: The host refused; the length is unchanged.
        """
        allocator = self._allocator
        async with self.lock:
            # An odd tail stays while no cluster has been given up and none is added.
            has_tail = self.end > allocator.end
            if not has_tail or (self.has_odd_tail and not allocator.tail_is_free):
                allocator.keep_tail()
                return False
            allocator.keep_tail()
            # A task that allocates during the cut finds the file too short, and waits for
            # the lock to grow it again.
            before, self.end = self.end, allocator.end
            try:
                await self._file.truncate(self.end)
            except BaseException:
                self.end = before
                allocator.tail_remains()
                raise
            self.has_odd_tail = False
            allocator.tail_was_cut(self.end)
            return True
