"""The length of an image's file: grown ahead of the data, and cut when its end is free.

The file grows by more than is needed, so that few allocations need a system call.

Growing uses ftruncate(2), which would shorten a file that another task has already grown further.
So only this module changes the length of the file of an open disk, and never while another task
holds `FileLength.lock`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError
from qedfuse.ondisk.constants import MAX_OFFSET

if TYPE_CHECKING:
    from qedfuse.disk.space.allocator import Allocator
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

MIN_GROWTH_BYTES: Final = 1 << 20
"""Minimum growth step, in bytes.

A step is shorter if it would take the file past the allocator's bound or past `MAX_OFFSET`.
"""
MAX_GROWTH_BYTES: Final = 1 << 24
"""Maximum growth step, in bytes, before it is rounded up to whole clusters.

On most file systems the bytes of a step take up no space before they are written to.
"""
_GROWTH_DIVISOR: Final = 16
"""The growth step is the needed length divided by this number, but within the two limits above.  It
is then rounded up to whole clusters."""


class FileLength:
    """Keeps the file long enough for the clusters that the allocator hands out.

    Attributes:
        end: File offset of the end of the last whole cluster of the file.
        has_odd_tail: Whether the file holds bytes past `end`, less than a cluster.  No valid entry
            refers to these bytes, but a new cluster at `end` would show them.
        lock: Held while a task waits for a change of the length.  `try_grow` does not await, so it
            only requires that no task holds the lock.
    """

    def __init__(self, file: HostFile, geometry: Geometry, allocator: Allocator) -> None:
        """Manage the length of ``file``, which holds the clusters of ``allocator``."""
        self._file = file
        self._geometry = geometry
        self._allocator = allocator
        size = file.size()
        self.end = geometry.floor(size)
        self.has_odd_tail = self.end != size
        self.lock = trio.Lock()

    async def grow(self, end: int) -> None:
        """Make the file at least ``end`` bytes long, unless it is already.

        Raises:
            HostError: A system call failed; the attribute `end` is unchanged.
        """
        if end <= self.end:
            return
        async with self.lock:
            if end <= self.end:
                return
            if self.has_odd_tail:
                # Cut the odd tail off first, so that the new cluster reads as zeros.  No datasync
                # is needed between the cut and the growth.  An entry for the new cluster is written
                # only after a later datasync, which makes both durable.  So if a crash loses only
                # the cut, no entry refers to the cluster with the tail.
                await self._file.truncate(self.end)
                self.has_odd_tail = False
            target = self._target(end)
            try:
                await self._grow_file(target)
            except HostError:
                if target == end:
                    raise
                # Perhaps the host refuses only the growth step: a limit of the length of files
                # (RLIMIT_FSIZE, or that of the file system) lies within the step, or the file
                # system is nearly full and allocates space for the step, as vfat does.
                target = end
                await self._grow_file(target)
            self.end = target

    def try_grow(self, end: int) -> bool:
        """Make the file at least ``end`` bytes long; return False if that would block or fail.

        If it returns False, the length is unchanged.
        """
        if end > self.end:
            if self.has_odd_tail or self.lock.locked() or end > MAX_OFFSET:
                return False
            target = self._target(end)
            if not self._file.try_grow(target):
                if target == end or not self._file.try_grow(end):
                    return False
                target = end  # as in `grow`
            self.end = target
        return True

    async def _grow_file(self, size: int) -> None:
        """Make the file ``size`` bytes long; the caller holds the lock."""
        if not self._file.try_grow(size):
            await self._file.truncate(size)

    def _target(self, end: int) -> int:
        """Return the length to which the file should grow if it must have ``end`` bytes."""
        step = max(MIN_GROWTH_BYTES, min(MAX_GROWTH_BYTES, end // _GROWTH_DIVISOR))
        bound = min(self._allocator.bound, self._geometry.floor(MAX_OFFSET))
        return max(end, min(self._geometry.ceil(end + step), bound))

    async def truncate_tail(self) -> bool:
        """Cut off the part of the file past the allocator's end; return whether it was cut.

        An odd tail alone is not cut off here: `grow` cuts it off when the file must grow.
        Afterwards `Allocator.tail_is_free` is False, unless a system call failed or the allocator's
        end became lower during the cut.

        The file reads as zeros where it grows again later.  No datasync is needed after the cut.
        If a crash loses the cut, clusters past the allocator's end keep their old bytes.  But then
        no entry in the file refers to such a cluster: an entry for it is written only after a
        datasync, which makes the cut durable, too.

        Raises:
            HostError: A system call failed; the length is unchanged, and a later call tries again.
        """
        allocator = self._allocator
        async with self.lock:
            allocator.note_tail_handled()
            if self.end <= allocator.end:
                return False
            # Lower `end` before the cut.  So a task that allocates during the cut waits for the
            # lock.
            before, self.end = self.end, allocator.end
            try:
                await self._file.truncate(self.end)
            except BaseException:
                self.end = before
                allocator.note_tail_remains()
                raise
            self.has_odd_tail = False
            allocator.note_tail_cut(self.end)
            return True
