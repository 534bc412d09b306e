"""Which clusters of the file are free, and how long the file is.

Only the allocator changes the file's length.  It grows the file in steps, ahead of the
data: a write into a new cluster then never extends the file itself, so that growing
(which must never shorten the file by accident) has one place and one lock, and costs
one system call for many clusters.  What was grown too far is cut off again when the
image is quiet (`trim`).
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from qedfuse.errors import NoSpaceError
from qedfuse.ondisk.constants import MAX_OFFSET

if TYPE_CHECKING:
    from qedfuse.disk.commit import Commit
    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.geometry import Geometry

GROWTH_BYTES: Final = 1 << 20
"""How far the file is grown ahead of what is needed, at least."""


class Run(NamedTuple):
    """Neighbouring clusters: a file offset, and a length in bytes.

    ``blank`` says that they read as zeros, because nothing was ever written there.
    """

    offset: int
    length: int
    blank: bool

    @property
    def end(self) -> int:
        """The file offset just past the run."""
        return self.offset + self.length


class Allocator:
    """Hands out clusters: those that were given back first, then new ones at the end.

    Attributes:
        bound: Length in bytes beyond which the file is not grown ahead.
    """

    def __init__(self, file: HostFile, geometry: Geometry, commit: Commit, bound: int) -> None:
        """Allocate in ``file``; growing ahead stops at ``bound`` bytes."""
        self._file = file
        self._commit = commit
        self._geometry = geometry
        self.bound = bound
        size = file.size()
        self.end = geometry.floor(size)
        self._file_end = self.end
        self._has_tail = self.end != size
        self._used_end = self.end
        self._free: list[tuple[int, int]] = []
        self._grow_lock = trio.Lock()

    async def allocate(self, clusters: int) -> Run:
        """Take a run of up to ``clusters`` clusters; the caller asks again for the rest.

        Raises:
            NoSpaceError: The file cannot grow any more.
        """
        size = self._geometry.cluster_size
        if self._free:
            start, end = self._free.pop(0)
            run = Run(start, min(end - start, clusters * size), blank=False)
            if run.end < end:
                self._free.insert(0, (run.end, end))
            try:
                # It may have been given back because the file could not grow over it.
                await self._grow(run.end)
            except BaseException:
                self.release(run)
                raise
            return run
        return await self._extend(clusters * size)

    async def allocate_table(self) -> Run:
        """Take the clusters of a new table at the end of the file, where they are blank."""
        return await self._extend(self._geometry.table_bytes)

    async def _extend(self, length: int) -> Run:
        """Take new clusters at the end of the file."""
        run = Run(self.end, length, blank=self.end >= self._used_end)
        if run.end > MAX_OFFSET:
            msg = f"{self._file.name}: file size: found {run.end}, expected at most {MAX_OFFSET}"
            raise NoSpaceError(msg)
        # No await between reading the end and moving it: no two runs overlap.
        self.end = run.end
        try:
            await self._grow(run.end)
        except BaseException:
            self.release(run)
            raise
        self._used_end = max(self._used_end, run.end)
        return run

    async def _grow(self, end: int) -> None:
        """Make the file at least ``end`` bytes long."""
        if end <= self._file_end:
            return
        async with self._grow_lock:
            if end <= self._file_end:
                return
            if self._has_tail:
                # Bytes behind the last whole cluster belong to nobody, but would show
                # up in a new cluster.  They must be gone for good before that cluster
                # is used: a crash could lose the cut and keep the growth.
                await self._file.truncate(self._file_end)
                await self._commit.barrier()
                self._has_tail = False
            ahead = self._geometry.ceil(end + GROWTH_BYTES)
            target = max(end, min(ahead, self.bound))
            await self._file.truncate(target)
            self._file_end = target

    def release(self, run: Run) -> None:
        """Take back clusters that no table refers to, or ever did since they were given out."""
        if run.end == self.end:
            self._used_end = max(self._used_end, run.end)
            self.end = run.offset
        else:
            insort(self._free, (run.offset, run.end))

    async def trim(self) -> None:
        """Cut off the end of the file that is not in use."""
        async with self._grow_lock:
            if self._file_end <= self.end or self._has_tail:
                return
            # Whoever allocates while the cut is under way finds the file too short and
            # waits for the lock to grow it again.
            before, cut = self._file_end, self.end
            self._file_end = cut
            try:
                await self._file.truncate(cut)
            except BaseException:
                self._file_end = before
                raise
            # What is grown from here on is blank only when the cut cannot be lost.
            await self._commit.barrier()
            self._used_end = cut
