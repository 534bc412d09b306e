"""A cell of the comparison: a load, a state of the image, a unit and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

KIB: Final = 1 << 10
MIB: Final = 1 << 20

Stage: TypeAlias = Literal["full", "empty", "overlay", "hole", "chain"]
"""The state of the image before the load; see `benchmarks.images`."""

Unit: TypeAlias = Literal["IOPS", "MiB/s", "walks/s", "s"]

Cold: TypeAlias = Literal["mount", "host"]
"""The caches that are emptied first: the mount's page cache, or the host's as well."""


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
    """

    pattern: Literal["read", "write", "randread", "randwrite", "randrw"]
    block: int
    depth: int = 1
    processes: int = 1
    direct: bool = True
    fsync: bool = False
    fsync_at_end: bool = False
    max_bytes: int = 0

    @property
    def writes(self) -> bool:
        """Whether the load changes the disk."""
        return self.pattern not in {"read", "randread"}


Plain: TypeAlias = Literal["walk", "copy", "tar"]
"""Other loads: find all holes with lseek; copy a source tree and sync it; read it with tar."""


@dataclass(frozen=True)
class Cell:
    """A row of the table.

    Attributes:
        name: Its name on the command line; words between hyphens.
        title: Its title in the table.
        unit: The unit of its figures; less is better for seconds, more for all others.
        stage: The state of the image before the load.
        load: The load.
        qemu_target: How many times QEMU's rate qedfuse should reach; None for no target.
        baseline_target: The same for the baseline's rate.
        cold: Which caches are emptied before each measurement.
        warm: Whether the whole disk is read through the mount before the first measurement.
        loop: Whether the load runs on an ext4 on a loop device, and whether that device uses
            the mount's page cache.
        note: A remark that is needed to understand the row.
    """

    name: str
    title: str
    unit: Unit
    stage: Stage
    load: Fio | Plain
    qemu_target: float | None = None
    baseline_target: float | None = None
    cold: Cold | None = None
    warm: bool = False
    loop: Literal["buffered", "direct"] | None = None
    note: str = ""

    @property
    def parallel(self) -> bool:
        """Whether the server gets concurrent requests, so that threads may pay off."""
        load = self.load
        if self.loop or not isinstance(load, Fio):
            return True
        return not load.direct or load.depth * load.processes > 1
