"""The allocation of clusters alone: no tables, no quarantine, and no scan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from qedfuse.disk.space.allocator import Allocator
from qedfuse.disk.space.filelength import FileLength
from qedfuse.disk.space.freemap import FreeMap
from qedfuse.disk.space.marking import Marking
from qedfuse.disk.space.spacemanager import SpaceManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import HostFile
    from qedfuse.ondisk.header import Header


class NothingToReclaim:
    """A source of free clusters that never has any."""

    def should_reclaim(self) -> bool:
        """Return False: there is nothing to wait for."""
        return False

    async def reclaim_before_growth(self) -> None:
        """Free nothing."""

    async def wait_for_free_clusters(self) -> bool:
        """Return False: nothing becomes free."""
        return False


class Space(NamedTuple):
    """The objects that hand out the clusters of one file."""

    allocator: Allocator
    length: FileLength
    manager: SpaceManager


def make_space(
    file: HostFile,
    header: Header,
    bound: int,
    missing_tables: Callable[[], int] = lambda: 0,
) -> Space:
    """Hand out the clusters of ``file``, whose length is within ``bound`` bytes."""
    marking = Marking(FreeMap(header.table_size), "file")
    allocator = Allocator(header, header.geometry.floor(file.size()), missing_tables, marking)
    allocator.bound = bound
    length = FileLength(file, header.geometry, allocator)
    return Space(allocator, length, SpaceManager(file, allocator, length, NothingToReclaim()))
