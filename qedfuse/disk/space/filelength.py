"""The length of an image's file: grown in steps ahead of the data, cut when that is not needed.

A write into a new cluster never extends the file itself, so that growing (which must
never shorten the file by accident) has one place and one lock, and costs one system call
for many clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.ondisk.constants import MAX_OFFSET

if TYPE_CHECKING:
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

GROWTH_BYTES: Final = 1 << 20
"""How far the file is grown ahead of what is needed, at least."""
MOST_GROWTH_BYTES: Final = 1 << 24
"""The same, at most.  It takes no space on the host before it is used."""
_GROWTH_SHARE: Final = 16
"""Between them it is this part of the file."""


class FileLength:
    """Changes how long the file is.

    Attributes:
        end: How many bytes of the file are whole clusters.
        has_tail: Whether there are bytes behind the last whole cluster.  They belong to
            nobody, but would show up in a new cluster.
        lock: Held while the length changes.
    """

    def __init__(self, file: HostFile, geometry: Geometry) -> None:
        """Take the file as long as it is."""
        self._file = file
        self._geometry = geometry
        size = file.size()
        self.end = geometry.floor(size)
        self.has_tail = self.end != size
        self.lock = trio.Lock()

    async def grow(self, end: int, most: int) -> None:
        """Make the file at least ``end`` bytes long, and not much longer than ``most``.

        Raises:
            HostError: The host refused.
        """
        if end <= self.end:
            return
        async with self.lock:
            if end <= self.end:
                return
            if self.has_tail:
                # A crash could lose the cut and keep the growth, but not once an entry
                # refers to the new cluster: both come before the first datasync of the
                # round that writes the entry.
                await self._file.truncate(self.end)
                self.has_tail = False
            target = self._target(end, most)
            if not self._file.try_grow(target):
                await self._file.truncate(target)
            self.end = target

    def try_grow(self, end: int, most: int) -> bool:
        """Do what `grow` does, if that needs no waiting; tell whether it is done."""
        if end > self.end:
            target = self._target(end, most)
            waiting = self.has_tail or self.lock.locked() or target > MAX_OFFSET
            if waiting or not self._file.try_grow(target):
                return False
            self.end = target
        return True

    def _target(self, end: int, most: int) -> int:
        """Choose the file's length if it has to reach up to ``end``."""
        step = max(GROWTH_BYTES, min(MOST_GROWTH_BYTES, end // _GROWTH_SHARE))
        return max(end, min(self._geometry.ceil(end + step), most))

    async def cut(self, end: int) -> None:
        """Make the file ``end`` bytes long, with `lock` held; a crash may lose that.

        For the reason why no datasync is needed see `grow`.

        Raises:
            HostError: The host refused.
        """
        # Whoever allocates while the cut is under way finds the file too short and
        # waits for the lock to grow it again.
        before, self.end = self.end, end
        try:
            await self._file.truncate(end)
        except BaseException:
            self.end = before
            raise
        self.has_tail = False
