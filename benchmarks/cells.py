"""A cell of the comparison: a load, a state of the image, a unit and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

KIB: Final = 1 << 10
MIB: Final = 1 << 20

Stage: TypeAlias = Literal["full", "part", "empty", "overlay", "hole", "chain"]
"""The state of the image before the load; see `benchmarks.images`."""

Unit: TypeAlias = Literal["IOPS", "MiB/s", "walks/s", "s"]

Cold: TypeAlias = Literal["mount", "host"]
"""The caches that are emptied first: the mount's page cache, or the host's as well."""

Pages: TypeAlias = Literal["clean", "dirty", "under write-back"]
"""The state of the image's pages in the host's page cache; see `benchmarks.pagecache`."""


@dataclass(frozen=True)
class Fio:
    """A load that fio generates.

    Attributes:
        pattern: fio's ``rw``.
        block: Bytes per request.
        depth: Requests in flight per process.
        processes: The number of concurrent processes.
        direct: Whether to use O_DIRECT, and so bypass the kernel's page cache.
        fsync: Whether to call fsync after each write.
        fsync_at_end: Whether to call fsync once, at the end.
        max_bytes: The load ends after this number of bytes, if its time is not over before;
            0 for no limit.
        area: The number of bytes at the beginning of the disk that the load uses; 0 for all.
    """

    pattern: Literal["read", "write", "randread", "randwrite", "randrw"]
    block: int
    depth: int = 1
    processes: int = 1
    direct: bool = True
    fsync: bool = False
    fsync_at_end: bool = False
    max_bytes: int = 0
    area: int = 0

    @property
    def writes(self) -> bool:
        """Whether the load changes the disk."""
        return self.pattern not in {"read", "randread"}

    def min_changed(self, writes: int, size: int) -> int:
        """Return the least number of blocks that ``writes`` writes to ``size`` bytes change.

        fio uses each block once before it uses any block again.  In a mixed load about half
        of the blocks are written at the first use.
        """
        blocks = min(self.area or size, size) // self.block
        return min(writes, blocks * 2 // 5 if self.pattern == "randrw" else blocks)


Plain: TypeAlias = Literal["walk", "copy", "tar", "cp"]
"""Other loads: find all holes with lseek; copy a source tree and sync it; read it with tar;
copy the whole disk to a file on the host with cp."""


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        name: Its name on the command line; words between hyphens.
        title: Its title in the table.
        unit: The unit of its figures; less is better for seconds, more for all others.
        stage: The state of the image before the load.
        load: The load; several loads run concurrently, each on a disk of its own.
        peer_target: The rate that qedfuse should reach, in multiples of that of the faster QEMU.
        baseline_target: The same in multiples of the baseline's rate; None for no target.
        cold: Which caches are emptied before each measurement.
        pages: The state of the image's pages before each measurement; None if they
            stay as the previous measurement has left them, apart from their write-back.
        warm: Whether the whole disk is read through the mount before the first measurement.
        loop: Whether the load runs on an ext4 on a loop device, and whether that device uses
            the mount's page cache.
        note: A remark that is needed to understand the row.
    """

    name: str
    title: str
    unit: Unit
    stage: Stage
    load: Fio | tuple[Fio, ...] | Plain
    peer_target: float = 1.0
    baseline_target: float | None = None
    cold: Cold | None = None
    pages: Pages | None = None
    warm: bool = False
    loop: Literal["buffered", "direct"] | None = None
    note: str = ""

    @property
    def fio(self) -> tuple[Fio, ...]:
        """The loads that fio generates, one for each disk; empty if another program does."""
        if isinstance(self.load, Fio):
            return (self.load,)
        return self.load if isinstance(self.load, tuple) else ()

    @property
    def disks(self) -> int:
        """The number of disks."""
        return max(1, len(self.fio))

    @property
    def writes(self) -> bool:
        """Whether the load changes the disk, or one of the disks, directly."""
        return any(load.writes for load in self.fio)

    @property
    def parallel(self) -> bool:
        """Whether the server gets concurrent requests, so that threads may make it faster."""
        if self.loop or len(self.fio) != 1:
            return True
        load = self.fio[0]
        return not load.direct or load.depth * load.processes > 1
